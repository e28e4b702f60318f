"""RMSNorm over all heads together, then rotation of the interleaved channel pairs of every head.

Wan's QK-norm is one scalar per token times one gain per channel (RMSNorm, arXiv 1910.07467, eq. 4; RoPE, arXiv
2104.09864, section 3.2.2). The channels of a token are read once and written once. Shape letters: B batch, N tokens, H
heads, D channels per head.
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
from .common import rotate, rotate_pairs

MAX_CHANNELS = 16384


@jit(do_not_specialize=["length", "tokens"])
def _norm_kernel(
    x, weight, rotations, out, eps, length, tokens, x_b, x_n, out_b, out_n, rotations_n,
    SIZE: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Process all channels of BLOCK_N of the `length` tokens of a batch; each item has `tokens` tokens."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    inside = i < length
    mask = inside[:, None] & (c < SIZE)[None, :]
    n = i % tokens
    source = x + (i // tokens) * x_b + n * x_n
    found = tl.load(source[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    norm = tl.rsqrt(tl.sum(found * found, 1) / SIZE + eps)
    gain = tl.load(weight + c, mask=c < SIZE, other=0.0).to(tl.float32)
    found = found * norm[:, None] * gain[None, :]
    if rotations is not None:
        turn = tl.load((rotations + n * rotations_n)[:, None] + (c % D)[None, :], mask=mask, other=0.0)
        found = rotate_pairs(found, turn, BLOCK_N, BLOCK_C)
    target = out + (i // tokens) * out_b + n * out_n
    tl.store(target[:, None] + c[None, :], found.to(out.dtype.element_ty), mask=mask)


def qk_norm_rope(x: Tensor, weight: Tensor, eps: float, rotations: Tensor | None, heads: int) -> Tensor:
    """Normalized and rotated queries or keys `[B, N, H, D]`, contiguous, in the dtype of `x`.

    `x` `[B, N, H D]`, with contiguous channels, and `weight` `[H D]` are float16, bfloat16 or float32; their dtypes may
    differ. The norm covers all heads together and uses `eps`. `rotations`, float32 `[N, D / 2, 2]` (cos, sin), rotate
    the pairs (2p, 2p + 1) of every head; None skips the rotation. Computed in float32. `x` and `weight` get gradients.

    Raises ValueError for arguments that do not fit, NotImplementedError for what `why_not_qk_norm_rope` rejects.
    """
    _check(x, weight, rotations, heads)
    return ops.qk_norm_rope(x, weight, eps, rotations, heads)


def qk_norm_rope_(out: Tensor, x: Tensor, weight: Tensor, eps: float, rotations: Tensor | None, heads: int) -> None:
    """`qk_norm_rope` written to `out` `[B, N, H, D]` in the dtype of `x`, for example a part of a workspace.

    In `out`, the channels of all heads of a token must be contiguous. No gradients. Raises the same errors as
    `qk_norm_rope`.
    """
    _check(x, weight, rotations, heads)
    check_tensor("out", out, (*x.shape[:2], heads, x.shape[2] // heads), x.dtype, like=x)
    require(out.stride(2) == out.shape[3] or heads == 1, "the heads of out must be contiguous")
    ops.qk_norm_rope_(out, x, weight, eps, rotations, heads)


def qk_norm_rope_reference(x: Tensor, weight: Tensor, eps: float, rotations: Tensor | None, heads: int) -> Tensor:
    """`qk_norm_rope` in plain torch, computed in float64 for float64 inputs, else in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    found = x.to(wide)
    found = found * torch.rsqrt(found.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
    found = found.unflatten(-1, (heads, -1))
    return (found if rotations is None else rotate(found, rotations)).to(x.dtype)


def why_not_qk_norm_rope(heads: int, head_dim: int, dtype: torch.dtype | None = None) -> str | None:
    """Why `qk_norm_rope` does not support H, D or this dtype, in one line; None if it does."""
    if not 1 <= heads * head_dim <= MAX_CHANNELS:
        return f"qk_norm_rope: {heads * head_dim} channels over all heads; supported: 1 to {MAX_CHANNELS}"
    if head_dim % 2:
        return f"qk_norm_rope: {head_dim} channels per head cannot be rotated; use an even number"
    return why_not_dtype("qk_norm_rope", dtype)


def norm_plan(channels: int, head_dim: int) -> Plan:
    """Whole tokens per program: about 2048 channels, or one token if it has more."""
    block = power_of_two(channels)
    constants = {"SIZE": channels, "D": head_dim, "BLOCK_N": max(1, 2048 // block), "BLOCK_C": block}
    return Plan(constants, num_warps=max(4, block // 512), num_stages=1)


def _check(x: Tensor, weight: Tensor, rotations: Tensor | None, heads: int) -> None:
    check_tensor("x", x, (None,) * 3)
    length, channels = x.shape[1:]
    require(heads >= 1 and channels % heads == 0, "{} channels are not divisible by {} heads", channels, heads)
    head_dim = channels // heads
    for dtype in (x.dtype, weight.dtype):
        refuse(why_not_qk_norm_rope(heads, head_dim, dtype))
    check_tensor("weight", weight, (channels,), like=x)
    if rotations is not None:
        check_tensor("rotations", rotations, (length, head_dim // 2, 2), torch.float32, like=x)
        require(rotations.stride(1) == 2 or head_dim == 2, "the pairs of rotations must be contiguous")


def _launch(x: Tensor, weight: Tensor, eps: float, rotations: Tensor | None, heads: int) -> Tensor:
    out = torch.empty(*x.shape[:2], heads, x.shape[2] // heads, dtype=x.dtype, device=x.device)
    _launch_into(out, x, weight, eps, rotations, heads)
    return out


def _launch_into(out: Tensor, x: Tensor, weight: Tensor, eps: float, rotations: Tensor | None, heads: int) -> None:
    batch, tokens, channels = x.shape
    plan = norm_plan(channels, channels // heads)
    launch(
        _norm_kernel, (ceil_div(batch * tokens, plan.constants["BLOCK_N"]),), plan, x,
        x, weight, rotations, out, eps, batch * tokens, tokens, *x.stride()[:2], *out.stride()[:2],
        0 if rotations is None else rotations.stride(0),
    )  # fmt: skip


def _reference_into(out, x, weight, eps, rotations, heads):
    out.copy_(qk_norm_rope_reference(x, weight, eps, rotations, heads))


def _fake(x, weight, eps, rotations, heads):
    return x.new_empty(x.shape[0], x.shape[1], heads, x.shape[2] // heads)


_qk_norm_rope = define(
    "qk_norm_rope",
    "(Tensor x, Tensor weight, float eps, Tensor? rotations, int heads) -> Tensor",
    _launch,
    qk_norm_rope_reference,
    _fake,
)
define(
    "qk_norm_rope_",
    "(Tensor(a!) out, Tensor x, Tensor weight, float eps, Tensor? rotations, int heads) -> ()",
    _launch_into,
    _reference_into,
    lambda *arguments: None,
    mutates=("out",),
)


def _keep(ctx, inputs, output):
    x, weight, ctx.eps, rotations, _ = inputs
    ctx.save_for_backward(x, weight, rotations)


def _backward(ctx, gradient):
    """Gradients in plain torch, in float32: the inverse rotation, then the backward of the norm."""
    x, weight, rotations = ctx.saved_tensors
    gradient = gradient.float()
    if rotations is not None:
        gradient = rotate(gradient, rotations, -1.0)
    gradient = gradient.flatten(2)
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + ctx.eps)
    normed = wide * scale
    inner = gradient * weight.float()
    to_x = scale * (inner - normed * (inner * normed).mean(-1, keepdim=True))
    return to_x.to(x.dtype), (gradient * normed).sum((0, 1)).to(weight.dtype), None, None, None


_qk_norm_rope.register_autograd(_backward, setup_context=_keep)
