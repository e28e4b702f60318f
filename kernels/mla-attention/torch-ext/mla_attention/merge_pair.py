"""Merge two attention outputs over disjoint sets of keys without stacking them first.

Shape letters: B batch, Q queries, H heads, V value channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._ops import ops
from ._runtime import ceil_div, check_tensor, define, jit, launch, refuse, tl
from .merge import merge_plan, merge_reference, why_not_merge


@jit(do_not_specialize=["queries"])
def _merge_pair_kernel(
    out_a,
    lse_a,
    out_b,
    lse_b,
    out,
    lse,
    queries,
    heads,
    a_stride_b,
    a_stride_q,
    a_stride_h,
    b_stride_b,
    b_stride_q,
    b_stride_h,
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
    log_offset = tl.program_id(1).to(tl.int64) * queries + q
    log_a = tl.load(lse_a + log_offset, mask=inside, other=float("-inf"))
    log_b = tl.load(lse_b + log_offset, mask=inside, other=float("-inf"))
    top = tl.maximum(log_a, log_b)
    # If both parts are empty, any finite base avoids NaN in the differences.
    base = tl.where(top == float("-inf"), 0.0, top)
    weight_a, weight_b = tl.exp(log_a - base), tl.exp(log_b - base)
    total = weight_a + weight_b
    row = q.to(tl.int64)[:, None]
    # The output of an empty part is undefined, so it is not read.
    a = tl.load(
        out_a + b * a_stride_b + h * a_stride_h + row * a_stride_q + v[None, :],
        mask=mask & (weight_a > 0)[:, None],
        other=0.0,
    )
    c = tl.load(
        out_b + b * b_stride_b + h * b_stride_h + row * b_stride_q + v[None, :],
        mask=mask & (weight_b > 0)[:, None],
        other=0.0,
    )
    mixed = weight_a[:, None] * a.to(tl.float32) + weight_b[:, None] * c.to(tl.float32)
    mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
    target = out + ((b * queries + row) * heads + h) * VALUE + v[None, :]
    tl.store(target, mixed.to(out.dtype.element_ty), mask=mask)
    logs = tl.where(total > 0, base + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(lse + log_offset, logs, mask=inside)


def merge_pair(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """`merge` of two parts: `(out [B, Q, H, V], lse [B, H, Q])`.

    `out_a` and `out_b` `[B, Q, H, V]` share a dtype, which is also that of the output: float16, bfloat16 or float32.
    `lse_a` and `lse_b` are float32 `[B, H, Q]`. Raises the same errors as `merge`.
    """
    _check(out_a, lse_a, out_b, lse_b)
    return ops.merge_pair(out_a, lse_a, out_b, lse_b)


def merge_pair_reference(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_pair` in plain torch, by `merge_reference`."""
    return merge_reference(torch.stack([out_a, out_b]), torch.stack([lse_a, lse_b]))


def _check(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    check_tensor("out_a", out_a, (None,) * 4)
    batch, queries, heads, channels = out_a.shape
    check_tensor("out_b", out_b, tuple(out_a.shape), out_a.dtype, like=out_a)
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        check_tensor(name, lse, (batch, heads, queries), torch.float32, like=out_a)
    refuse(why_not_merge(channels, out_a.dtype))


def _launch(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    batch, queries, heads, channels = out_a.shape
    out, lse = torch.empty_like(out_a, memory_format=torch.contiguous_format), torch.empty_like(lse_a).contiguous()
    plan = merge_plan(channels)
    launch(
        _merge_pair_kernel,
        (ceil_div(queries, plan.constants["BLOCK_Q"]), batch * heads),
        plan,
        out_a,
        out_a,
        lse_a.contiguous(),
        out_b,
        lse_b.contiguous(),
        out,
        lse,
        queries,
        heads,
        *out_a.stride()[:3],
        *out_b.stride()[:3],
    )
    return out, lse


def _fake(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


define(
    "merge_pair",
    "(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
    _launch,
    merge_pair_reference,
    _fake,
)
