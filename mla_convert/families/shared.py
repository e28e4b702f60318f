"""Runs the blocks of layers that share a latent over a whole clip.

A layer's history is restored from the latents of earlier chunks, which are complete only after the last of the layers
that share them. So these blocks do not process the whole clip one by one. Together they process it chunk by chunk, as
in a rollout, with the latents of earlier chunks in place of a cache. Other layers are not affected, and no token is
computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..mla.attention import AttentionPass, ChunkView, Part
from ..mla.latent import whole_latent
from .base import BlockInputs


def chunk_by_chunk(blocks: Sequence[nn.Module], tokens: Tensor, inputs: BlockInputs, run: Callable[..., Any]) -> Tensor:
    """The output `[B, S, C]` of `blocks`, whose layers share a latent, for a clip's `tokens` `[B, S, C]`.

    `run(part, *args)` calls a part of the work, which a backward pass may recompute.
    """
    runs, step = inputs.modulation.shape[1], inputs.step
    length = tokens.shape[1] // runs

    def one_chunk(own: Tensor, modulation: Tensor, latents: Tensor | None, view: ChunkView) -> tuple[Tensor, Tensor]:
        place = step.grid_rotations[view.own]
        local = AttentionPass([view._replace(own=slice(0, own.shape[1]))], place, write=True, latents=latents)
        local.context_batch = step.context_batch
        parts: list[Tensor] = []
        for block in blocks:
            part = Part()
            own = block(own, inputs.text, modulation, replace(local, part=part))
            assert part.rows is not None
            parts.append(part.rows)
        return own, whole_latent(parts)

    done: list[Tensor] = []
    latents: Tensor | None = None
    for view in step.views:
        # Either one modulation applies to all tokens, or there is one per run of `length` tokens.
        part = slice(None) if runs == 1 else slice(view.own.start // length, view.own.stop // length)
        out, rows = run(one_chunk, tokens[:, view.own], inputs.modulation[:, part], latents, view)
        done.append(out)
        latents = rows if latents is None else torch.cat([latents, rows], dim=1)
    return torch.cat(done, dim=1)
