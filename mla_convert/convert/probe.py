"""Sample a dense layer's tokens and the sensitivity of its output to the cached keys and values.

To first order, an error `df_j = [dk_j; dv_j]` in cached token j changes the outputs of the queries i by
`sum_j J_ij df_j`, with `J_ij = sum_h p_ij^h W_O^h [(v_j - o_i) q~_ij^T / sqrt(D), I]` and `q~` the query rotated into
the key's frame. For random z_i of unit variance, `g_j = sum_i J_ij^T z_i` is a probe of token j. The second moment of
the probes is the metric in which the best low-rank code of [k; v] changes the outputs least. With the gradient of a
random projection of the velocity in place of z, it is the metric for the least change of the velocity. Shape letters:
B batch, S tokens of a clip, C width, T sampled tokens, Q queries, K keys, H heads, D channels, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..mla.attention import AttentionPass, ChunkView, DenseSelfAttention, padded
from ..mla.rope import rotate
from .config import CalibrationConfig

LOGITS_AT_ONCE = 1 << 25


@dataclass
class LayerSample:
    """One layer's activations and gradients at T cached tokens; float32 on the CPU.

    `queried` `[Q, C]` is the layer's input at Q of all tokens, clean and noisy, for fits of the queries; empty unless
    asked for.

    `hidden` `[T, C]` is the layer's input. `key` and `value` `[T, H, D]` are what it would cache, with keys normalized
    and unrotated. `place`, complex `[T, P]`, is the token's spatial rotation.

    The gradients are those of K random projections of the outputs, `[T * K, H, D]`, with the K of a token adjacent.
    `value_grad` is with respect to the value. Three are with respect to the key: `rotated_grad` if the key is rotated
    when it is read, as in the dense layer; `placed_grad` if it is read with queries rotated only by their place in the
    frame; `fixed_grad` if it is read with unrotated queries. With `rotated_only` the last two have no channels.
    """

    hidden: Tensor
    key: Tensor
    value: Tensor
    place: Tensor
    value_grad: Tensor
    rotated_grad: Tensor
    placed_grad: Tensor
    fixed_grad: Tensor
    queried: Tensor

    @property
    def probes(self) -> int:
        """K, the number of gradients per token."""
        return len(self.value_grad) // len(self.value)


FIELDS = tuple(f.name for f in fields(LayerSample))
GRADIENTS = tuple(name for name in FIELDS if name.endswith("_grad"))


@torch.no_grad()
def sample_layer(
    layer: DenseSelfAttention,
    hidden_states: Tensor,
    step: AttentionPass,
    config: CalibrationConfig,
    history_only: bool,
    max_tokens: int,
    generator: torch.Generator,
    output_grads: Sequence[Tensor] | None = None,
    rotated_only: bool = False,
    queries: bool = False,
) -> LayerSample:
    """Sample one forward pass of a layer on `hidden_states` `[B, S, C]`, at up to `max_tokens` tokens.

    `output_grads` `[B, S, C]` are the gradients of random projections of the model's velocity with respect to the
    layer's output. Without them, z is drawn for every query, `config.probes` times. With `history_only`, only queries
    of later chunks count, because with an exact own chunk only they read a token from the cache. With `rotated_only`,
    the gradients for unrotated keys are left out. With `queries`, up to `max_tokens` tokens of the whole pass become
    `queried`. Draws come from `generator`, on the CPU. Raises UserError if nothing is ever read from the cache.
    """
    if history_only and not any(view.has_history for view in step.views):
        raise UserError("calibration clips are one chunk long: nothing is ever read from the cache; use longer clips")
    query, key, value = (layer.split_heads(x).float() for x in layer.project(hidden_states))
    if output_grads is None:
        drawn = (torch.randn(hidden_states.shape, generator=generator) for _ in range(config.probes))
        output_grads = [z.to(hidden_states.device) for z in drawn]
    output: Any = layer.to_out[0]
    pulled = [layer.split_heads(grad.float() @ output.weight.float()) for grad in output_grads]
    # With an exact own chunk only the clean context is ever cached.
    cached = (step.context_batch or len(query)) if history_only else len(query)
    grads = torch.zeros(2 if rotated_only else 4, len(pulled), cached, *key.shape[1:], device=key.device)
    for view in step.views:
        rows = torch.arange(view.own.start, view.own.stop)
        thinned = rows[torch.randperm(len(rows), generator=generator)[: config.queries_per_chunk]].sort().values
        scaled = [grad[:, thinned] * (len(rows) / len(thinned)) ** 0.5 for grad in pulled]
        _add_grads(grads, layer.scale, view, thinned, (query, key, value), scaled, step, history_only)
    kept = slice(None) if step.cached is None or not history_only else step.cached
    tokens = key[:, kept].shape[1]
    chosen = torch.randperm(cached * tokens, generator=generator)[:max_tokens]
    place = step.grid_rotations[kept][chosen % tokens]

    def flat(x: Tensor) -> Tensor:
        return x[:cached, kept].flatten(0, 1)[chosen].float().cpu()

    def by_token(kind: Tensor) -> Tensor:
        return torch.stack([flat(probe) for probe in kind], dim=1).flatten(0, 1)

    computed = [by_token(kind) for kind in grads]
    left_out = [computed[0][..., :0]] * (4 - len(computed))
    inputs = hidden_states.flatten(0, 1)
    queried = torch.randperm(len(inputs), generator=generator)[:max_tokens] if queries else chosen[:0]
    gradients = dict(zip(GRADIENTS, (*computed, *left_out), strict=True))
    asked = inputs[queried].float().cpu()
    return LayerSample(flat(hidden_states), flat(key), flat(value), place.cpu(), **gradients, queried=asked)


def _add_grads(
    grads: Tensor,
    scale: float,
    view: ChunkView,
    rows: Tensor,
    projected: tuple[Tensor, Tensor, Tensor],
    output_grads: Sequence[Tensor],
    step: AttentionPass,
    history_only: bool,
) -> None:
    """Add the gradients from the queries `rows` of one chunk to every token's `grads` `[2 or 4, K, B, S, H, D]`.

    `output_grads` are the K gradients with respect to the outputs of these queries, `[B, Q, H, D]`.
    """
    query, key, value = projected
    past = torch.cat([torch.arange(s.start, s.stop) for s in view.history]) if view.history else rows[:0]
    own = torch.arange(view.own.start, view.own.stop)
    if history_only and not len(past):
        return
    rotations = torch.cat([view.history_rotations, view.own_rotations])
    turned = rotate(query[:, rows], view.own_rotations[rows - view.own.start])
    placed = rotate(query[:, rows], step.grid_rotations[rows])
    context = step.context_batch or len(query)
    items = max(1, LOGITS_AT_ONCE // (len(rows) * len(rotations) * query.shape[2]))
    for batch in torch.arange(len(query)).split(items):
        source = batch % context
        keys = rotate(torch.cat([key[source][:, past], key[batch][:, own]], dim=1), rotations)
        values = torch.cat([value[source][:, past], value[batch][:, own]], dim=1)
        keys, values = padded(keys, view.zero_keys), padded(values, view.zero_keys)
        weights = (torch.einsum("bqhd,bkhd->bhqk", turned[batch], keys) * scale).softmax(-1)
        for probe, pulled in enumerate(output_grads):
            pull = torch.einsum("bqhd,bkhd->bhqk", pulled[batch], values)
            gain = weights * (pull - (weights * pull).sum(-1, keepdim=True)) * scale
            readers = (pulled[batch], turned[batch], placed[batch], query[batch][:, rows])
            for kind, reader in enumerate(readers[: len(grads)]):
                found = torch.einsum("bhqk,bqhd->bkhd", weights if kind == 0 else gain, reader)[:, : len(rotations)]
                if kind == 1:
                    found = rotate(found, rotations.conj())
                for item, index in enumerate(source.tolist()):
                    grads[kind, probe, index, past] += found[item, : len(past)]
                if not history_only:
                    grads[kind, probe, batch.unsqueeze(1), own] += found[:, len(past) :]


def require_finite(sample: LayerSample, layer: int) -> LayerSample:
    """The sample of layer number `layer`. Raises UserError for NaN or infinite activations."""
    for name in FIELDS:
        x = getattr(sample, name)
        if not torch.isfinite(torch.view_as_real(x) if x.is_complex() else x).all():
            raise UserError(
                f"calibration gave NaN or infinite values in the {name} of layer {layer}; check the weights"
            )
    return sample
