"""Runs one block of a causal Wan-like transformer: modulated self-attention, cross-attention and feed-forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..mla.attention import AttentionPass


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`x (1 + scale) + shift`, with one scale and shift per run of tokens (T equal runs).

    `x` is `[B, S, C]`, `scale` and `shift` are `[B, T, C]`; T divides S.
    """
    runs = x.unflatten(1, (scale.shape[1], -1))
    return torch.addcmul(shift.unsqueeze(2), runs, 1 + scale.unsqueeze(2)).flatten(1, 2)


def wan_block_arguments(config: Any) -> tuple[Any, ...]:
    """The positional arguments of the block of Wan, and of SkyReels-V2, in a transformer's configuration."""
    return (
        config.num_attention_heads * config.attention_head_dim,
        config.ffn_dim,
        config.num_attention_heads,
        config.qk_norm,
        config.cross_attn_norm,
        config.eps,
        config.added_kv_proj_dim,
    )


class CausalBlock:
    """Mixin for a Wan-like stock block: a forward with one timestep per run of tokens.

    It comes before the stock class, which has `norm1`, `attn1`, `norm2`, `attn2`, `norm3`, `ffn` and
    `scale_shift_table` `[1, 6, C]`; `attn1` is a `CausalSelfAttention`.
    """

    norm1: Any
    attn1: Any
    norm2: Any
    attn2: Any
    norm3: Any
    ffn: Any
    scale_shift_table: Any

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: AttentionPass
    ) -> Tensor:
        """`hidden_states` `[B, S, C]` after the block; `temb` is `[B, T, 6, C]` and T divides S."""
        table = (self.scale_shift_table.unsqueeze(1) + temb.float()).unbind(2)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = table

        def gated(x: Tensor, gate: Tensor) -> Tensor:
            return (x.float().unflatten(1, (gate.shape[1], -1)) * gate.unsqueeze(2)).flatten(1, 2)

        dtype = hidden_states.dtype
        normed = modulate(self.norm1(hidden_states.float()), scale, shift).to(dtype)
        out = self.attn1(normed, None, None, rotary_emb)
        hidden_states = (hidden_states.float() + gated(out, gate)).to(dtype)

        normed = self.norm2(hidden_states.float()).to(dtype)
        hidden_states = hidden_states + self.attn2(normed, encoder_hidden_states=encoder_hidden_states)

        normed = modulate(self.norm3(hidden_states.float()), ff_scale, ff_shift).to(dtype)
        out = self.ffn(normed)
        return (hidden_states.float() + gated(out, ff_gate)).to(dtype)
