"""Samples of a dense layer's tokens and of how its output depends on what is cached.

To first order an error `df_j = [dk_j; dv_j]` in cached token j changes the output of query i by
`sum_j J_ij df_j`, with `J_ij = sum_h p_ij^h W_O^h [(v_j - o_i) q~_ij^T / sqrt(D), I]` and `q~` the
query rotated into the key's frame. A probe is `J_ij^T z` for a random unit-variance z: the second
moment of probes is the metric in which a low-rank code of [k; v] hurts the output least. Shape
letters: T tokens, N probes, H heads, D channels, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import flow
from ..errors import UserError
from ..mla.attention import AttentionPass, ChunkView, DenseSelfAttention
from ..mla.rope import rotate
from .config import CalibrationConfig


class CalibrationBatch(NamedTuple):
    """Clean latents `[B, C, F, H, W]` and `encoder_hidden_states` `[B, L, text_dim]`."""

    latents: Tensor
    encoder_hidden_states: Tensor


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


@dataclass
class _Recorder:
    layer: DenseSelfAttention
    config: CalibrationConfig
    history_only: bool
    generator: torch.Generator
    tokens_a_pass: int
    parts: list[LayerSample] = field(default_factory=list)

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        hidden_states, _, _, step = args
        self.parts.append(self.sample(hidden_states, step))

    @torch.no_grad()
    def sample(self, hidden_states: Tensor, step: AttentionPass) -> LayerSample:
        layer = self.layer
        query, key, value = (layer.split_heads(x).float() for x in layer.project(hidden_states))
        context = step.context_batch or len(hidden_states)
        # With an exact own chunk only the clean context is ever cached.
        cached = context if self.history_only else len(hidden_states)
        tokens = cached * hidden_states.shape[1]
        chosen = torch.randperm(tokens, generator=self.generator)[: self.tokens_a_pass]
        place = step.grid_rotations

        def flat(x: Tensor) -> Tensor:
            return x[:cached].flatten(0, 1)[chosen].float()

        probes = [
            self._probe(view, query, key, value, place, context)
            for view in step.views
            if view.history_frames or not self.history_only
        ]
        if not probes:
            raise UserError(
                "calibration clips are one chunk long: nothing is ever read from the cache; use longer clips"
            )
        return LayerSample(
            flat(hidden_states),
            flat(key),
            flat(value),
            place[chosen % hidden_states.shape[1]],
            *(torch.cat(parts) for parts in zip(*probes, strict=True)),
        )

    def _probe(
        self, view: ChunkView, query: Tensor, key: Tensor, value: Tensor, place: Tensor, context: int
    ) -> tuple[Tensor, ...]:
        layer, batch = self.layer, len(query)
        own = torch.arange(view.own.start, view.own.stop)
        past = torch.cat([torch.arange(s.start, s.stop) for s in view.history]) if view.history else own[:0]
        rows = own[torch.randint(len(own), (self.config.queries_per_chunk,), generator=self.generator)]
        q = query[:, rows]
        q_rotations = view.own_rotations[rows - view.own.start]
        source = torch.arange(batch) % context
        keys = torch.cat([key[source][:, past], key[:, own]], dim=1)
        values = torch.cat([value[source][:, past], value[:, own]], dim=1)
        rotations = torch.cat([view.history_rotations, view.own_rotations])
        logits = torch.einsum("bqhd,bkhd->bqhk", rotate(q, q_rotations), rotate(keys, rotations)) * layer.scale
        weights = logits.softmax(-1)
        out = torch.einsum("bqhk,bkhd->bqhd", weights, values)
        readable = len(past) if self.history_only else weights.shape[-1]
        # Keys are drawn by mean attention weight and reweighted, which leaves the sum over keys unbiased.
        odds = weights[..., :readable].mean(2) + 1e-9
        odds = odds / odds.sum(-1, keepdim=True)
        count = self.config.keys_per_query
        drawn = torch.multinomial(odds.flatten(0, 1), count, replacement=True, generator=self.generator)
        drawn = drawn.view(batch, len(rows), count)
        importance = (1 / (count * odds.gather(-1, drawn))).sqrt()
        item, row = torch.arange(batch).view(-1, 1, 1), torch.arange(len(rows)).view(1, -1, 1)
        p = weights[item, row, :, drawn] * importance.unsqueeze(-1)
        deviation = values[item, drawn] - out[item, row]
        output: Any = layer.to_out[0]
        z = torch.randn(*drawn.shape, output.out_features, generator=self.generator)
        pulled = (z @ output.weight.float()).unflatten(-1, (layer.heads, -1))
        gain = p * (pulled * deviation).sum(-1) * layer.scale
        relative = q_rotations[row] * rotations[drawn].conj()
        return (
            q.unsqueeze(2).expand(-1, -1, count, -1, -1).flatten(0, 2),
            relative.flatten(0, 2),
            place[rows].view(1, len(rows), 1, -1).expand(batch, -1, count, -1).flatten(0, 2),
            gain.flatten(0, 2),
            (p.unsqueeze(-1) * pulled).flatten(0, 2),
        )


def _join(parts: list[LayerSample], layer: int) -> LayerSample:
    joined = LayerSample(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(LayerSample)))
    for f in fields(LayerSample):
        if not torch.isfinite(torch.view_as_real(x) if (x := getattr(joined, f.name)).is_complex() else x).all():
            raise UserError(
                f"calibration gave NaN or infinite values in the {f.name} of layer {layer}; check the weights"
            )
    return joined


@torch.no_grad()
def calibrate(
    model: Any,
    batches: Iterable[CalibrationBatch],
    config: CalibrationConfig,
    history_only: bool,
    progress: Callable[[int], None] | None = None,
) -> list[LayerSample]:
    """Run a dense causal `model` on noisy copies of the clips and sample every layer.

    Noise levels are uniform, one a chunk; history is the clean clip. With `history_only` the probes
    ask only about tokens of earlier chunks, which is all that an exact own chunk leaves to the cache.
    Raises UserError for NaN or infinite activations.
    """
    generator = torch.Generator().manual_seed(config.seed)
    passes = max(1, -(-config.clips // config.batch_size))
    recorders = [
        _Recorder(block.attn1, config, history_only, generator, max(1, config.max_tokens // passes))
        for block in model.blocks
    ]
    hooks = [recorder.layer.register_forward_pre_hook(recorder) for recorder in recorders]
    try:
        for index, batch in enumerate(batches):
            clean = batch.latents.to(model.device, torch.float32)
            t = flow.chunk_times(len(clean), model.causal.chunks(clean.shape[2]), generator)
            noise = torch.randn(clean.shape, generator=generator)
            text = flow.drop_prompts(batch.encoder_hidden_states, config.empty_prompt_rate, generator)
            model(
                flow.add_noise(clean, noise, t).to(model.dtype),
                t * flow.NUM_TRAIN_TIMESTEPS,
                text.to(model.device, model.dtype),
                context=clean.to(model.dtype),
            )
            if progress is not None:
                progress(index + 1)
    finally:
        for hook in hooks:
            hook.remove()
    return [_join(recorder.parts, index) for index, recorder in enumerate(recorders)]
