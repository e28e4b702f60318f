"""Merge attention outputs over disjoint sets of keys, using their log-sum-exps.

Shape letters: n parts, B batch, Q queries, H heads, V value channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._ops import ops
from ._runtime import (
    Plan,
    ceil_div,
    check_tensor,
    define,
    jit,
    launch,
    power_of_two,
    refuse,
    require,
    tl,
    why_not_dtype,
)

MAX_VALUE_CHANNELS = 1024


@jit(do_not_specialize=["parts", "queries"])
def _merge_kernel(
    outs,
    lses,
    out,
    lse,
    parts,
    queries,
    heads,
    stride_n,
    stride_b,
    stride_q,
    stride_h,
    VALUE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = tl.program_id(1) % heads
    v = tl.arange(0, BLOCK_V)
    inside = q < queries
    mask = inside[:, None] & (v < VALUE)[None, :]
    log_offset = tl.program_id(1).to(tl.int64) * queries
    log_part = tl.num_programs(1).to(tl.int64) * queries
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    logs = lses + log_offset + q
    for _ in range(parts):
        top = tl.maximum(top, tl.load(logs, mask=inside, other=float("-inf")))
        logs += log_part
    # If every part is empty, any finite base avoids NaN in the differences.
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK_Q], tl.float32)
    mixed = tl.zeros([BLOCK_Q, BLOCK_V], tl.float32)
    logs = lses + log_offset + q
    source = outs + b * stride_b + h * stride_h + q.to(tl.int64)[:, None] * stride_q + v[None, :]
    for _ in range(parts):
        weight = tl.exp(tl.load(logs, mask=inside, other=float("-inf")) - base)
        # The output of an empty part is undefined, so it is not read.
        part = tl.load(source, mask=mask & (weight > 0)[:, None], other=0.0)
        mixed += weight[:, None] * part.to(tl.float32)
        total += weight
        logs += log_part
        source += stride_n
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    target = out + ((b * queries + q[:, None]) * heads + h) * VALUE + v[None, :]
    tl.store(target, mixed.to(out.dtype.element_ty), mask=mask)
    tl.store(
        lse + log_offset + q,
        tl.where(total > 0, base + tl.log(tl.where(total > 0, total, 1.0)), float("-inf")),
        mask=inside,
    )


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of all parts: `(out [B, Q, H, V], lse [B, H, Q])`.

    `outs` `[n, B, Q, H, V]` are the outputs of the parts in float16, bfloat16 or float32. `lses` `[n, B, H, Q]` are
    their natural log-sum-exps in float32. A part with lse -inf contributes nothing, whatever its output holds; if all
    are -inf, the output is 0. Computed in float32 (FlashAttention-2, arXiv 2307.08691, section 2.3).

    Raises ValueError for shapes that do not fit, NotImplementedError for more than 1024 value channels or another
    dtype.
    """
    _check(outs, lses)
    return ops.merge(outs, lses)


def merge_reference(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """`merge` in plain torch, computed in the wider of float32 and the dtype of `outs`; lse has that dtype too."""
    wide = torch.promote_types(outs.dtype, torch.float32)
    lse = torch.logsumexp(lses.to(wide), dim=0)
    weights = torch.exp(lses.to(wide) - lse.masked_fill(lse == float("-inf"), 0))
    weights = weights.transpose(-1, -2).unsqueeze(-1)
    parts = torch.where(weights > 0, weights * outs.to(wide), torch.zeros((), dtype=wide, device=outs.device))
    return parts.sum(0).to(outs.dtype), lse


def why_not_merge(value_channels: int, dtype: torch.dtype | None = None) -> str | None:
    """Why `merge` does not support this number of value channels or this dtype, in one line; None if it does."""
    if not 1 <= value_channels <= MAX_VALUE_CHANNELS:
        return f"merge: {value_channels} value channels; supported: 1 to {MAX_VALUE_CHANNELS}"
    return why_not_dtype("merge", dtype)


def launch_merge(outs: Tensor, lses: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Launch the `merge` kernel without checks, with the output in `dtype`: the last step of split attention."""
    parts, batch, queries, heads, channels = outs.shape
    out = torch.empty(batch, queries, heads, channels, dtype=dtype, device=outs.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=outs.device)
    plan = merge_plan(channels)
    grid = (ceil_div(queries, plan.constants["BLOCK_Q"]), batch * heads)
    launch(
        _merge_kernel, grid, plan, outs, outs, lses.contiguous(), out, lse, parts, queries, heads, *outs.stride()[:4]
    )  # fmt: skip
    return out, lse


def merge_plan(channels: int) -> Plan:
    """Tiles of about 2048 elements."""
    block = power_of_two(channels)
    return Plan({"VALUE": channels, "BLOCK_Q": max(1, 2048 // block), "BLOCK_V": block}, num_warps=4, num_stages=1)


def _check(outs: Tensor, lses: Tensor) -> None:
    check_tensor("outs", outs, (None,) * 5)
    parts, batch, queries, heads, channels = outs.shape
    require(parts > 0, "merge needs at least one part")
    check_tensor("lses", lses, (parts, batch, heads, queries), torch.float32, like=outs)
    refuse(why_not_merge(channels, outs.dtype))


def _launch(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return launch_merge(outs, lses, outs.dtype)


def _fake(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


define("merge", "(Tensor outs, Tensor lses) -> (Tensor, Tensor)", _launch, merge_reference, _fake)
