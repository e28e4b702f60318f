"""Prepare queries for absorbed attention: RMSNorm over all heads, then unrotated and rotated channels separately.

With decoupled rotary keys (DeepSeek-V2, arXiv 2405.04434, section 2.1.3), some pairs of a query are not rotated and
multiply the latent. The others multiply the shared key: each is multiplied by a complex weight for its head and pair,
then rotated. Shape letters: B batch, N tokens, H heads, D channels per head, S unrotated pairs, P rotated pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._ops import ops
from ._runtime import Plan, check_tensor, define, jit, launch, power_of_two, refuse, require, tl
from .common import rotate
from .qk_norm_rope import qk_norm_rope_reference, why_not_qk_norm_rope


@jit(do_not_specialize=["tokens"])
def _split_kernel(
    x, weight, rotations, coefficients, still_pairs, turned_pairs, still, turned, eps, tokens, x_b, x_n, rotations_n,
    SIZE: tl.constexpr, D: tl.constexpr, STILL: tl.constexpr, TURNED: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Process one token. STILL and TURNED count the unrotated and the rotated pairs of all heads."""
    i = tl.program_id(0).to(tl.int64)
    n = i % tokens
    source = x + (i // tokens) * x_b + n * x_n
    c = tl.arange(0, BLOCK_C)
    found = tl.load(source + c, mask=c < SIZE, other=0.0).to(tl.float32)
    norm = tl.rsqrt(tl.sum(found * found, 0) / SIZE + eps)
    heads = SIZE // D
    s = tl.arange(0, BLOCK_S)
    inside = s < STILL
    channel = (s // (STILL // heads)) * D + 2 * tl.load(still_pairs + s % (STILL // heads), mask=inside, other=0)
    for part in tl.static_range(2):
        value = tl.load(source + channel + part, mask=inside, other=0.0).to(tl.float32)
        gain = tl.load(weight + channel + part, mask=inside, other=0.0).to(tl.float32)
        tl.store(still + i * (2 * STILL) + 2 * s + part, (value * norm * gain).to(still.dtype.element_ty), mask=inside)
    t = tl.arange(0, BLOCK_T)
    inside = t < TURNED
    pair = tl.load(turned_pairs + t % (TURNED // heads), mask=inside, other=0)
    channel = (t // (TURNED // heads)) * D + 2 * pair
    first = tl.load(source + channel, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + channel + 1, mask=inside, other=0.0).to(tl.float32)
    first *= norm * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    second *= norm * tl.load(weight + channel + 1, mask=inside, other=0.0).to(tl.float32)
    # Multiply by the conjugate of the pair's weight, then rotate.
    real = tl.load(coefficients + 2 * t, mask=inside, other=0.0).to(tl.float32)
    imaginary = tl.load(coefficients + 2 * t + 1, mask=inside, other=0.0).to(tl.float32)
    mixed, second = first * real + second * imaginary, second * real - first * imaginary
    cos = tl.load(rotations + n * rotations_n + 2 * pair, mask=inside, other=0.0)
    sin = tl.load(rotations + n * rotations_n + 2 * pair + 1, mask=inside, other=0.0)
    target = turned + i * (2 * TURNED) + 2 * t
    tl.store(target, (mixed * cos - second * sin).to(turned.dtype.element_ty), mask=inside)
    tl.store(target + 1, (mixed * sin + second * cos).to(turned.dtype.element_ty), mask=inside)


def split_query(
    x: Tensor,
    weight: Tensor,
    eps: float,
    rotations: Tensor,
    coefficients: Tensor,
    still_pairs: Tensor,
    turned_pairs: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor]:
    """Unrotated queries `[B, N, H, 2 S]` and rotated queries `[B, N, H, 2 P]`, contiguous, in the dtype of `x`.

    `x` `[B, N, H D]`, with contiguous channels, and `weight` `[H D]` are float16, bfloat16 or float32; their dtypes may
    differ. The norm covers all heads together and uses `eps`. `still_pairs` int64 `[S]` and `turned_pairs` int64 `[P]`,
    at least one each, select the unrotated and the rotated pairs (2p, 2p + 1) of a head. `coefficients` `[H, P, 2]` are
    complex weights whose conjugates multiply the rotated pairs. `rotations`, float32 `[N, D / 2, 2]` (cos, sin), cover
    all pairs of a head. Computed in float32, without gradients.

    Raises ValueError for arguments that do not fit, NotImplementedError for what `why_not_qk_norm_rope` rejects.
    """
    _check(x, weight, rotations, coefficients, still_pairs, turned_pairs, heads)
    return ops.split_query(x, weight, eps, rotations, coefficients, still_pairs, turned_pairs, heads)


def split_query_reference(
    x: Tensor,
    weight: Tensor,
    eps: float,
    rotations: Tensor,
    coefficients: Tensor,
    still_pairs: Tensor,
    turned_pairs: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor]:
    """`split_query` in plain torch, computed in float64 for float64 inputs, else in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = qk_norm_rope_reference(x.to(wide), weight, eps, None, heads).unflatten(-1, (-1, 2))
    first, second = normed[..., turned_pairs, :].unbind(-1)
    real, imaginary = coefficients.to(wide).unbind(-1)
    first, second = first * real + second * imaginary, second * real - first * imaginary
    turned = rotate(torch.stack([first, second], dim=-1).flatten(-2), rotations[:, turned_pairs])
    return normed[..., still_pairs, :].flatten(-2).to(x.dtype), turned.to(x.dtype)


def split_plan(channels: int, head_dim: int, still: int, turned: int) -> Plan:
    """One token per program; `still` and `turned` count pairs per head."""
    heads = channels // head_dim
    block = power_of_two(channels)
    constants = {
        "SIZE": channels,
        "D": head_dim,
        "STILL": heads * still,
        "TURNED": heads * turned,
        "BLOCK_C": block,
        "BLOCK_S": power_of_two(heads * still),
        "BLOCK_T": power_of_two(heads * turned),
    }
    return Plan(constants, num_warps=max(4, block // 512), num_stages=1)


def _check(x, weight, rotations, coefficients, still_pairs, turned_pairs, heads):
    check_tensor("x", x, (None,) * 3)
    tokens, channels = x.shape[1:]
    require(heads >= 1 and channels % heads == 0, "{} channels are not divisible by {} heads", channels, heads)
    head_dim = channels // heads
    for dtype in (x.dtype, weight.dtype):
        refuse(why_not_qk_norm_rope(heads, head_dim, dtype))
    check_tensor("weight", weight, (channels,), like=x)
    check_tensor("rotations", rotations, (tokens, head_dim // 2, 2), torch.float32, like=x)
    require(rotations.stride(1) == 2 or head_dim == 2, "the pairs of rotations must be contiguous")
    for name, pairs in (("still_pairs", still_pairs), ("turned_pairs", turned_pairs)):
        check_tensor(name, pairs, (None,), torch.int64, like=x)
        require(1 <= len(pairs) <= head_dim // 2, "{} names {} pairs of {}", name, len(pairs), head_dim // 2)
    check_tensor("coefficients", coefficients, (heads, len(turned_pairs), 2), like=x)
    require(coefficients.is_contiguous(), "coefficients must be contiguous")


def _launch(x, weight, eps, rotations, coefficients, still_pairs, turned_pairs, heads):
    batch, tokens, channels = x.shape
    still = x.new_empty(batch, tokens, heads, 2 * len(still_pairs))
    turned = x.new_empty(batch, tokens, heads, 2 * len(turned_pairs))
    launch(
        _split_kernel, (batch * tokens,), split_plan(channels, channels // heads, len(still_pairs), len(turned_pairs)),
        x, x, weight, rotations, coefficients, still_pairs, turned_pairs, still, turned, eps, tokens, *x.stride()[:2],
        rotations.stride(0),
    )  # fmt: skip
    return still, turned


def _fake(x, weight, eps, rotations, coefficients, still_pairs, turned_pairs, heads):
    shape = (x.shape[0], x.shape[1], heads)
    return x.new_empty(*shape, 2 * len(still_pairs)), x.new_empty(*shape, 2 * len(turned_pairs))


define(
    "split_query",
    "(Tensor x, Tensor weight, float eps, Tensor rotations, Tensor coefficients, Tensor still_pairs, "
    "Tensor turned_pairs, int heads) -> (Tensor, Tensor)",
    _launch,
    split_query_reference,
    _fake,
)
