"""Samples of a dense layer's tokens and of how its output depends on what is cached.

To first order an error `df_j = [dk_j; dv_j]` in cached token j changes the output of query i by
`sum_j J_ij df_j`, with `J_ij = sum_h p_ij^h W_O^h [(v_j - o_i) q~_ij^T / sqrt(D), I]` and `q~` the
query rotated into the key's frame. A probe is `J_ij^T z` for a random unit-variance z: the second
moment of probes is the metric in which a low-rank code of [k; v] hurts the output least. With the
gradient of a random projection of the velocity in place of z it hurts the velocity least. Shape
letters: B batch, S tokens of a clip, C width, T tokens, N probes, H heads, D channels, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..mla.attention import AttentionPass, ChunkView, DenseSelfAttention
from ..mla.rope import rotate
from .config import CalibrationConfig


@dataclass
class LayerSample:
    """What one layer was seen to do; every tensor on the CPU.

    `hidden` `[T, C]` are inputs of tokens that get cached, `key` `[T, H, D]` their normalised,
    unrotated keys, `value` `[T, H, D]`, `place` complex `[T, P]` their spatial rotation.

    Of each probe: `query` `[N, H, D]` unrotated, `relative` complex `[N, P]` its rotation in the
    key's frame, `query_place` complex `[N, P]` its spatial rotation, `key_gain` `[N, H]` the factor
    `z^T W_O^h p (v_j - o_i) / sqrt(D)` of the query, and `value_probe` `[N, H, D]` = `p W_O^hT z`.
    """

    hidden: Tensor
    key: Tensor
    value: Tensor
    place: Tensor
    query: Tensor
    relative: Tensor
    query_place: Tensor
    key_gain: Tensor
    value_probe: Tensor


@torch.no_grad()
def sample_layer(
    layer: DenseSelfAttention,
    hidden_states: Tensor,
    step: AttentionPass,
    config: CalibrationConfig,
    history_only: bool,
    max_tokens: int,
    generator: torch.Generator,
    output_grad: Tensor | None = None,
) -> LayerSample:
    """Sample one forward of a layer on `hidden_states` `[B, S, C]`.

    `output_grad` `[B, S, C]` is the gradient of a random projection of the model's velocity with
    respect to the layer's output; without it every probe draws its own z. With `history_only` the
    probes ask only about tokens of earlier chunks, which is all that an exact own chunk leaves to
    the cache. Draws come from `generator`, on the CPU. Raises UserError if nothing is ever read.
    """
    query, key, value = (layer.split_heads(x).float() for x in layer.project(hidden_states))
    context = step.context_batch or len(hidden_states)
    # With an exact own chunk only the clean context is ever cached.
    cached = context if history_only else len(hidden_states)
    tokens = cached * hidden_states.shape[1]
    chosen = torch.randperm(tokens, generator=generator)[:max_tokens]

    def flat(x: Tensor) -> Tensor:
        return x[:cached].flatten(0, 1)[chosen].float()

    probes = [
        _probe(layer, view, (query, key, value), step, config, history_only, generator, output_grad)
        for view in step.views
        if view.history_frames or not history_only
    ]
    if not probes:
        raise UserError("calibration clips are one chunk long: nothing is ever read from the cache; use longer clips")
    return LayerSample(
        flat(hidden_states),
        flat(key),
        flat(value),
        step.grid_rotations[chosen % hidden_states.shape[1]],
        *(torch.cat(parts) for parts in zip(*probes, strict=True)),
    )


def _probe(
    layer: DenseSelfAttention,
    view: ChunkView,
    projected: tuple[Tensor, Tensor, Tensor],
    step: AttentionPass,
    config: CalibrationConfig,
    history_only: bool,
    generator: torch.Generator,
    output_grad: Tensor | None,
) -> tuple[Tensor, ...]:
    """The last five fields of a `LayerSample` for random queries of one chunk."""
    query, key, value = projected
    batch = len(query)
    own = torch.arange(view.own.start, view.own.stop)
    past = torch.cat([torch.arange(s.start, s.stop) for s in view.history]) if view.history else own[:0]
    rows = own[torch.randint(len(own), (config.queries_per_chunk,), generator=generator)]
    q = query[:, rows]
    q_rotations = view.own_rotations[rows - view.own.start]
    source = torch.arange(batch) % (step.context_batch or batch)
    keys = torch.cat([key[source][:, past], key[:, own]], dim=1)
    values = torch.cat([value[source][:, past], value[:, own]], dim=1)
    rotations = torch.cat([view.history_rotations, view.own_rotations])
    logits = torch.einsum("bqhd,bkhd->bqhk", rotate(q, q_rotations), rotate(keys, rotations)) * layer.scale
    weights = logits.softmax(-1)
    out = torch.einsum("bqhk,bkhd->bqhd", weights, values)
    readable = len(past) if history_only else weights.shape[-1]
    # Keys are drawn by mean attention weight and reweighted, which leaves the sum over keys unbiased.
    odds = weights[..., :readable].mean(2) + 1e-9
    odds = odds / odds.sum(-1, keepdim=True)
    count = config.keys_per_query
    drawn = torch.multinomial(odds.flatten(0, 1), count, replacement=True, generator=generator)
    drawn = drawn.view(batch, len(rows), count)
    importance = (1 / (count * odds.gather(-1, drawn))).sqrt()
    item, row = torch.arange(batch).view(-1, 1, 1), torch.arange(len(rows)).view(1, -1, 1)
    p = weights[item, row, :, drawn] * importance.unsqueeze(-1)
    deviation = values[item, drawn] - out[item, row]
    output: Any = layer.to_out[0]
    if output_grad is None:
        z = torch.randn(*drawn.shape, output.out_features, generator=generator)
    else:
        z = output_grad[:, rows].float().unsqueeze(2).expand(-1, -1, count, -1)
    pulled = (z @ output.weight.float()).unflatten(-1, (layer.heads, -1))
    gain = p * (pulled * deviation).sum(-1) * layer.scale
    relative = q_rotations[row] * rotations[drawn].conj()
    return (
        q.unsqueeze(2).expand(-1, -1, count, -1, -1).flatten(0, 2),
        relative.flatten(0, 2),
        step.grid_rotations[rows].view(1, len(rows), 1, -1).expand(batch, -1, count, -1).flatten(0, 2),
        gain.flatten(0, 2),
        (p.unsqueeze(-1) * pulled).flatten(0, 2),
    )


def join_samples(parts: list[LayerSample], layer: int) -> LayerSample:
    """The samples of several forwards of layer number `layer`. Raises UserError for NaN or infinite activations."""
    joined = LayerSample(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(LayerSample)))
    for f in fields(LayerSample):
        if not torch.isfinite(torch.view_as_real(x) if (x := getattr(joined, f.name)).is_complex() else x).all():
            raise UserError(
                f"calibration gave NaN or infinite values in the {f.name} of layer {layer}; check the weights"
            )
    return joined
