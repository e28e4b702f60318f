"""Implements multi-head latent attention for a causal video transformer with QK-norm.

The latent encodes keys after QK-norm, and values: `c = kv_a_proj([k; v])`. So the norm's scalar, which depends on all
heads, is exact in every layout, and only `c` and the shared rotary key are cached. Source: DeepSeek-V2
(arXiv 2405.04434, section 2.1), VideoMLA (arXiv 2605.30351, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionPass, CausalSelfAttention
from .config import CACHE_KEY, MLAConfig
from .core import Expansion, KeyValue, Query
from .plain import is_plain_linear
from .rope import rotate

LATENT_MODULES = ("q_a_proj", "q_b_proj", "kv_a_proj", "kv_b_proj", "k_pe_proj", "q_pe_coef", "k_mean")


class LatentSelfAttention(CausalSelfAttention):
    """Self-attention of one layer whose history is cached as low-rank latents.

    Parameters in addition to the dense layer's: `kv_a_proj` `[r, 2 H D]` encodes `[k; v]`. `kv_b_proj`
    `[H (N + V), r]` restores unrotated keys and values. `k_pe_proj` computes the shared rotary key (from k, or from c
    when derived). `q_pe_coef` `[H, R / 2, 2]` holds the complex weight of each shared pair in each head, applied to the
    queries. `k_mean` `[H, D]` is a constant key per head: subtracted before a key is encoded, and added, rotated, when
    it is read. Where layers share a latent, `encode` returns this layer's summand of it.
    """

    rope_index: Tensor
    nope_index: Tensor

    def __init__(self, dim: int, heads: int, head_dim: int, eps: float, layer: int, mla: MLAConfig) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads, self.head_dim, self.layer, self.mla = heads, head_dim, layer, mla
        self.scale = head_dim**-0.5
        self.own_chunk_exact = mla.own_chunk == "exact"
        self.rank = mla.kv_lora_rank[layer]
        self.rope_pairs = list(mla.rope_pairs[layer])
        self.nope_pairs = list(mla.nope_pairs[layer])
        # Tensors, because torch.compile would specialize on a list; on the CPU, because meta builds need the values.
        for name, pairs in (("rope_index", self.rope_pairs), ("nope_index", self.nope_pairs)):
            self.register_buffer(name, torch.tensor(pairs, dtype=torch.long, device="cpu"), persistent=False)
        self.key_channels = head_dim if mla.position == "rotate_on_read" else mla.qk_nope_head_dim(layer)
        if mla.q_lora_rank is None:
            self.to_q = nn.Linear(dim, inner)
        else:
            self.q_a_proj = nn.Linear(dim, mla.q_lora_rank, bias=False)
            self.q_b_proj = nn.Linear(mla.q_lora_rank, inner)
        self.to_k = nn.Linear(dim, inner)
        self.to_v = nn.Linear(dim, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim), nn.Dropout(0.0)])
        self.norm_q = nn.RMSNorm((heads, head_dim), eps=eps)
        self.norm_k = nn.RMSNorm((heads, head_dim), eps=eps)
        self.kv_a_proj = nn.Linear(2 * inner, self.rank)
        self.kv_b_proj = nn.Linear(self.rank, heads * (self.key_channels + mla.v_head_dim))
        if self.rope_pairs:
            source = self.rank if mla.position == "derived" else inner
            self.k_pe_proj = nn.Linear(source, 2 * len(self.rope_pairs))
            self.q_pe_coef = nn.Parameter(torch.ones(heads, len(self.rope_pairs), 2))
        self.k_mean = nn.Parameter(torch.zeros(heads, head_dim)) if mla.key_mean else None

    @property
    def row_width(self) -> int:
        return self.mla.row_width(self.layer)

    @property
    def row_layer(self) -> int:
        return self.mla.row_layer(self.layer)

    @property
    def caches_shared_key(self) -> bool:
        return self.mla.position in CACHE_KEY and len(self.rope_index) > 0

    @property
    def bakes(self) -> bool:
        """Whether the latents hold keys rotated by the token's place in the frame."""
        return self.mla.position == "baked"

    @property
    def expansion(self) -> Expansion:
        if self.mla.position == "rotate_on_read":
            return Expansion(self.key_channels, 0, 0, self.mla.v_head_dim, one_query=True)
        mean = 0 if self.k_mean is None else self.head_dim
        return Expansion(self.key_channels, 2 * len(self.rope_pairs), mean, self.mla.v_head_dim, one_query=False)

    def why_not_absorbed(self) -> str | None:
        if self.mla.position == "rotate_on_read":
            return "rotate_on_read rotates the expanded keys, which cannot be absorbed"
        if self.mla.position == "derived":
            return "the shared keys of `derived` are computed from the latent, which the absorbed kernel does not do"
        return None if self.k_mean is None else "every head has a mean key, which is as wide as a dense one"

    def project_query(self, hidden_states: Tensor) -> Tensor:
        if self.mla.q_lora_rank is None:
            return super().project_query(hidden_states)
        query: Tensor = self.q_b_proj(self.q_a_proj(hidden_states))
        return query

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.project_raw(hidden_states)
        query, key = self.norm_q(self.split_heads(query)), self.norm_k(self.split_heads(key))
        return query.flatten(2), key.flatten(2), value

    def encode(self, key: Tensor, value: Tensor, step: AttentionPass) -> Tensor:
        if self.k_mean is not None:
            key = key - self.k_mean.flatten()
        placed = key
        if self.bakes:
            placed = self._bake(self.split_heads(key), step).flatten(2)
        latent = self.kv_a_proj(torch.cat([placed, value], dim=-1))
        if not self.caches_shared_key:
            return latent
        return torch.cat([latent, self.k_pe_proj(key)], dim=-1)

    def keep(self, key: Tensor, value: Tensor, step: AttentionPass) -> None:
        if self.mla.layers_per_latent == 1:
            super().keep(key, value, step)
            return
        # The caller gathers and writes the sum, which is complete only after the last of the layers.
        assert step.part is not None
        step.part.rows = self.encode(key[: step.context_batch], value[: step.context_batch], step.local).float()

    def restore(self, key: Tensor, value: Tensor, step: AttentionPass) -> KeyValue:
        if self.mla.layers_per_latent > 1:
            raise ValueError("a layer that shares its latent cannot restore alone; give the pass its `latents`")
        return super().restore(key, value, step)

    def history_query(self, query: Query, step: AttentionPass) -> Query:
        if self.mla.position == "rotate_on_read":
            return query
        assert query.rope is not None
        placed = self._bake(query.rope, step) if self.bakes else query.rope
        nope = _select(placed, self.nope_index) if len(self.nope_index) else None
        mean = None if self.k_mean is None else query.rope
        if not len(self.rope_index):
            return Query(nope, None, mean=mean)
        pairs = torch.view_as_complex(_select(query.rope, self.rope_index).float().contiguous().unflatten(-1, (-1, 2)))
        heads = step.heads(self)
        coefficient = torch.view_as_complex((self.q_pe_coef if heads is None else self.q_pe_coef[heads]).float())
        rope = torch.view_as_real(pairs * coefficient.conj()).flatten(-2).to(query.rope.dtype)
        return Query(nope, rope, self.rope_index, mean)

    def expand(self, rows: Tensor, heads: slice | None = None) -> KeyValue:
        latent = rows[..., : self.rank]
        key, value = self._restored(latent, heads).split([self.key_channels, self.mla.v_head_dim], dim=-1)
        k_mean = self.k_mean if heads is None or self.k_mean is None else self.k_mean[heads]
        if self.mla.position == "rotate_on_read":
            return KeyValue(None, key, value)
        nope = key if len(self.nope_index) else None
        if not len(self.rope_index):
            return KeyValue(nope, None, value, mean=k_mean)
        shared = rows[..., self.rank :] if self.caches_shared_key else self.k_pe_proj(latent)
        return KeyValue(nope, shared.unsqueeze(2), value, self.rope_index, k_mean)

    def _restored(self, latent: Tensor, heads: slice | None) -> Tensor:
        """Keys and values of each of the `heads`, `[B, K, H, N + V]`, from latents `[B, K, r]`."""
        if heads is None or not is_plain_linear(self.kv_b_proj):
            restored = self.kv_b_proj(latent).unflatten(-1, (self.heads, -1))
            return restored if heads is None else restored[:, :, heads]
        return F.linear(latent, *self.restoring(heads)).unflatten(-1, (heads.stop - heads.start, -1))

    def restoring(self, heads: slice | None) -> tuple[Tensor, Tensor]:
        """Weight and bias of `kv_b_proj`, or of its part for some `heads`."""
        weight, bias = self.kv_b_proj.weight, self.kv_b_proj.bias
        if heads is None:
            return weight, bias
        wide = self.key_channels + self.mla.v_head_dim
        part = slice(heads.start * wide, heads.stop * wide)
        return weight[part], bias[part]

    def absorbed(self, heads: slice | None = None) -> AbsorbedWeights:
        """`kv_b_proj`, or its part for some `heads`, split for absorption into queries and outputs.

        Raises ValueError for `rotate_on_read`.
        """
        if self.mla.position == "rotate_on_read":
            raise ValueError("rotate_on_read rotates the expanded keys, which cannot be absorbed into the queries")
        sizes = [self.key_channels, self.mla.v_head_dim]
        weight, bias = self.restoring(heads)
        w_uk, w_uv = weight.unflatten(0, (-1, sum(sizes))).split(sizes, dim=1)
        b_uk, b_uv = bias.unflatten(0, (-1, sum(sizes))).split(sizes, dim=1)
        return AbsorbedWeights(w_uk, b_uk, w_uv, b_uv)

    def _bake(self, x: Tensor, step: AttentionPass) -> Tensor:
        """Rotate the spatial pairs of `[B, S, H, D]` by each token's place in its frame."""
        return rotate(x, step.grid_rotations)


def reading_together(
    layers: Sequence[CausalSelfAttention], hidden_states: Sequence[Tensor], step: AttentionPass
) -> AttentionPass:
    """The pass over a clip for layers that share a latent, with the complete latent computed from all their inputs.

    `hidden_states` `[B, S, C]` are the inputs of each layer. For a single layer this is `step` itself.
    """
    if len(layers) == 1:
        return step
    parts = []
    for layer, hidden in zip(layers, hidden_states, strict=True):
        _, key, value = layer.project(hidden)
        parts.append(layer.encode(key[: step.context_batch], value[: step.context_batch], step))
    return replace(step, latents=whole_latent(parts))


def whole_latent(parts: Sequence[Tensor]) -> Tensor:
    """The shared latent of some layers: the sum of their `parts`, `[B', S, r]`."""
    return sum(parts[1:], start=parts[0])


class AbsorbedWeights(NamedTuple):
    """Absorbed weights: `w_uk` `[H, N, r]`, `b_uk` `[H, N]`, `w_uv` `[H, V, r]`, `b_uv` `[H, V]`."""

    w_uk: Tensor
    b_uk: Tensor
    w_uv: Tensor
    b_uv: Tensor


def _select(x: Tensor, pairs: Tensor) -> Tensor:
    """The channels of some pairs: `[..., 2 P]` to `[..., 2 len(pairs)]`."""
    return x.unflatten(-1, (-1, 2))[..., pairs, :].flatten(-2)
