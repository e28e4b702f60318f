"""Expand cached latent rows to per-head keys and values, written to a workspace in reading order.

It is one matrix product: `kv_b_proj` on the gathered (and dequantized) latents. The sums start at the bias, and
interleaved channel pairs are rotated afterwards. A tile holds channels of several heads, which are rotated alike. The
shared rotary key is rotated once and repeated over the heads (DeepSeek-V2, arXiv 2405.04434, section 2.1; RoPE, arXiv
2104.09864). Shape letters: B batch, S slots, T tokens per frame, F frames read, H heads, N unrotated (or all) key
channels, V value channels, r `kv_lora_rank`, R shared rotary channels, W row width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._ops import ops
from ._runtime import (
    Plan,
    capability,
    ceil_div,
    check_tensor,
    define,
    jit,
    launch,
    power_of_two,
    refuse,
    require,
    tile_family,
    tl,
    why_not_dtype,
)
from .common import nibbles, rotate, rotate_pairs, valid_keys
from .expand_tiles import TILES, UNTUNED, Tiles
from .pack import copy_rows
from .quantize import GROUP, GROUP_OF_FOUR, dequantize_rows, row_parts, row_width
from .ring import check_ring, ring_index, ring_strides, row_align

MAX_RANK = 2048
MAX_CHANNELS = 256


@jit
def _add_latents(
    acc, source, steps, weights, COUNT: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the product of COUNT latents of some rows with their weights; in groups of 32, two latents share a byte."""
    PER_BYTE: tl.constexpr = 64 // GROUP
    for start in range(0, COUNT, BLOCK_R):
        i = start + tl.arange(0, BLOCK_R)
        stored = start // PER_BYTE + tl.arange(0, BLOCK_R // PER_BYTE)
        if COUNT % BLOCK_R == 0:
            tile = tl.load(source[:, None] + stored[None, :])
            w = tl.load(weights[:, None] + i[None, :])
        else:
            tile = tl.load(source[:, None] + stored[None, :], mask=(stored < COUNT // PER_BYTE)[None, :], other=0)
            w = tl.load(weights[:, None] + i[None, :], mask=(i < COUNT)[None, :], other=0.0)
        if PER_BYTE == 2:
            tile = nibbles(tile, BLOCK_M, BLOCK_R)
        if steps is not None:
            # A block lies within one group.
            step = tl.load(steps + start // GROUP).to(tl.float32)
            tile = (tile.to(tl.float32) * step[:, None]).to(w.dtype)
        acc = tl.dot(tile, w.T, acc, input_precision=PRECISION)
    return acc


@jit(do_not_specialize=["keys", "slots_b"])
def _expand_kernel(
    out, rows, scales, slots, num_keys, weight, bias, rotations, tokens, keys, heads, copies,
    out_b, out_k, out_h, rows_b, rows_s, rows_t, scales_b, scales_s, scales_t, slots_b, head_rows, rotations_k,
    RANK: tl.constexpr, EIGHT: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_FOUR: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One product: BLOCK_N of the CHANNELS of HEADS heads for a tile of keys; each is stored for `copies` heads.

    The first EIGHT latents have 8 bits and the others 4, or all have the same number. Rows begin at multiples of ALIGN.
    """
    first = tl.program_id(0) % TILES * BLOCK_N
    n = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    b = tl.program_id(2).to(tl.int64)
    valid = valid_keys(num_keys, keys)
    # Without the number, the grid ends with the valid keys, and the branch would take registers. Triton needs two ifs.
    if num_keys is not None:  # noqa: SIM102
        if tl.program_id(1) * BLOCK_M >= valid:
            return
    live = n < valid
    # Rows past the end repeat the last valid key, so no load of the product needs a mask.
    n = tl.minimum(n, valid - 1)
    slot = tl.load(slots + b * slots_b + n // tokens).to(tl.int64)
    # Strides that 16 does not divide, as of 24 + 32 bytes, would otherwise be unknown and every load a byte.
    source = rows + tl.multiple_of(b * rows_b + slot * rows_s + n % tokens * rows_t, ALIGN)
    steps = scales
    if scales is not None:
        steps = scales + b * scales_b + slot * scales_s + n % tokens * scales_t
    j = tl.arange(0, HEADS * BLOCK_N)
    c = first + j % BLOCK_N
    head = tl.program_id(0) // TILES * HEADS + j // BLOCK_N
    used = (c < CHANNELS) & (head < heads)
    row = tl.where(used, head * head_rows + c, 0)
    weights = weight + row * RANK
    acc = tl.zeros([BLOCK_M, HEADS * BLOCK_N], tl.float32)
    # Adding the bias after the product would need more registers, beside the sums and the rotations.
    if bias is not None:
        acc += tl.load(bias + row).to(tl.float32)[None, :]
    if EIGHT is None:
        acc = _add_latents(acc, source, steps, weights, RANK, 64, BLOCK_M, BLOCK_R, PRECISION)
    else:
        acc = _add_latents(acc, source, steps, weights, EIGHT, 64, BLOCK_M, BLOCK_R, PRECISION)
        steps += (EIGHT + 63) // 64
        acc = _add_latents(
            acc, source + EIGHT, steps, weights + EIGHT, RANK - EIGHT, 32, BLOCK_M, BLOCK_FOUR, PRECISION
        )
    if rotations is not None:
        place = first + tl.arange(0, BLOCK_N)
        turn = rotations + n.to(tl.int64)[:, None] * rotations_k + place[None, :]
        turn = tl.load(turn, mask=(place < CHANNELS)[None, :], other=0.0)
        acc = rotate_pairs(acc, turn, BLOCK_M, BLOCK_N, HEADS)
    target = out + b * out_b + n.to(tl.int64)[:, None] * out_k + (head.to(tl.int64) * out_h + c)[None, :]
    for _ in range(copies):
        tl.store(target, acc.to(out.dtype.element_ty), mask=live[:, None] & used[None, :])
        target += out_h


def expand_kv_(
    key_out: Tensor, value_out: Tensor, rows: Tensor, scales: Tensor | None, slots: Tensor, num_keys: Tensor | None,
    w_kvb: Tensor, b_kvb: Tensor, w_pe: Tensor | None, b_pe: Tensor | None, rotations: Tensor | None,
    rotate_heads: bool, eight: int | None = None,
) -> None:  # fmt: skip
    """Write the valid keys and values to `key_out` `[B, K, H, D]` and `value_out` `[B, K, H, V]`, in place.

    `rows` hold `[c | k_pe]`: `[B, S, T, W]` with a ring per item, or `[1, S, T, W]` with one ring for all. They may be
    int8 with float16 `scales` `[B or 1, S, T, ceil(W / 64)]`. Key j is token `j % T` of slot `slots[j // T]`; `slots`
    is int32 `[F]` for all items, or `[B, F]`. Keys from `num_keys` (int32 `[1]`, on the device; None: all are valid) on
    are neither read nor written; K may be larger or smaller than F T. `w_kvb` `[H (N + V), r]` and `b_kvb` hold N rows
    for the key, then V for the value, head by head.

    With `rotate_heads`, D = N and `rotations`, float32 `[F T, D / 2, 2]`, rotate all channels. Otherwise a key is
    `[nope | k_pe]` with D = N + R, and `rotations` `[F T, R / 2, 2]` rotate the shared `k_pe`. It is read from the
    channels of the row from r on or, if `w_pe` `[R, r]` is given, computed as `w_pe c + b_pe`. N or R may be 0.

    With `eight`, the first `eight` latents of int8 rows have 8 bits, the others 4, and the shared key 8: the format of
    `quantize_rows`, which also says how many scalars and scales a row has.

    Outputs, rows (unless int8) and weights share a dtype; sums and rotations are float32. Raises ValueError for
    arguments that do not fit, NotImplementedError for what `why_not_expand_kv` rejects.
    """
    _check(key_out, value_out, rows, scales, slots, num_keys, w_kvb, b_kvb, w_pe, b_pe, rotations, rotate_heads, eight)
    ops.expand_kv_(
        key_out, value_out, rows, scales, slots, num_keys, w_kvb, b_kvb, w_pe, b_pe, rotations, rotate_heads, eight
    )  # fmt: skip


def expand_kv_reference(
    key_out: Tensor, value_out: Tensor, rows: Tensor, scales: Tensor | None, slots: Tensor, num_keys: Tensor | None,
    w_kvb: Tensor, b_kvb: Tensor, w_pe: Tensor | None, b_pe: Tensor | None, rotations: Tensor | None,
    rotate_heads: bool, eight: int | None = None,
) -> None:  # fmt: skip
    """`expand_kv_` in plain torch, computed in float64 for float64 weights, else in float32."""
    wide = torch.promote_types(w_kvb.dtype, torch.float32)
    heads, value_channels, rank = key_out.shape[2], value_out.shape[3], w_kvb.shape[1]
    nope = w_kvb.shape[0] // heads - value_channels
    place = ring_index(rows, slots, len(key_out))
    found = rows[place].flatten(1, 2)
    if scales is not None:
        found = dequantize_rows(found, scales[place].flatten(1, 2), wide, eight, rank)
    count = min(found.shape[1], key_out.shape[1])
    found = found[:, :count].to(wide)
    latent = found[..., :rank]
    key, value = (
        F.linear(latent, w_kvb.to(wide), b_kvb.to(wide))
        .unflatten(-1, (heads, -1))
        .split([nope, value_channels], dim=-1)
    )
    if rotate_heads:
        key = rotate(key, rotations[:count])
    elif key_out.shape[3] > nope:
        shared = found[..., rank:]
        if w_pe is not None:
            shared = F.linear(latent, w_pe.to(wide), None if b_pe is None else b_pe.to(wide))
        shared = rotate(shared.unsqueeze(2), rotations[:count])
        key = torch.cat([key, shared.expand(-1, -1, heads, -1)], dim=-1)
    valid = torch.arange(count, device=rows.device) < (count if num_keys is None else num_keys)
    for target, result in ((key_out[:, :count], key), (value_out[:, :count], value)):
        target.copy_(torch.where(valid.view(-1, 1, 1), result.to(target.dtype), target))


def why_not_expand_kv(
    rank: int, key_channels: int, shared_channels: int, value_channels: int, dtype: torch.dtype | None = None
) -> str | None:
    """Why `expand_kv_` does not support r, N, R, V or this dtype, in one line; None if it does."""
    if not 1 <= rank <= MAX_RANK:
        return f"expand_kv: kv_lora_rank {rank}; supported: 1 to {MAX_RANK}"
    if shared_channels % 2:
        return f"expand_kv: {shared_channels} shared rotary channels; use an even number"
    counts = {"key": (key_channels, 0), "shared rotary": (shared_channels, 0), "value": (value_channels, 1)}
    for name, (count, least) in counts.items():
        if not least <= count <= MAX_CHANNELS:
            return f"expand_kv: {count} {name} channels; supported: {least} to {MAX_CHANNELS}"
    return why_not_dtype("expand_kv", dtype)


def expand_plan(
    rank: int, channels: int, heads: int, dtype: torch.dtype, capability: int, eight: int | None = None, align: int = 16
) -> Plan:
    """Tiles of keys by channels of several heads: the widest that compile without spilled registers.

    The first `eight` latents have 8 bits, if not all have the same number; rows begin at multiples of `align` scalars.
    """
    exact, common = dtype == torch.float32, math.gcd(rank, eight or 0)
    # Weights or mixed rows that begin anywhere are loaded one by one, in registers that the sums also need.
    anywhere = common % 2 or (eight is not None and align == 1) or (heads == 1 and common % 4)
    tiles = TILES if eight is None and common % 4 == 0 else UNTUNED
    chosen = Tiles(32, 32, GROUP, 4, 1) if exact else tiles[tile_family(capability)]
    if anywhere:
        chosen = chosen._replace(width=min(128, chosen.width), block_m=min(64, chosen.block_m))
    width = chosen.width
    # Least padding first, then the widest block.
    block_n = min((n for n in (64, 32, 16) if n <= width), key=lambda n: (ceil_div(channels, n) * n, -n))
    together = min(width // block_n, power_of_two(heads))
    constants = {
        "RANK": rank,
        "EIGHT": eight,
        "CHANNELS": channels,
        "TILES": ceil_div(channels, block_n),
        "HEADS": together,
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": block_n,
        "BLOCK_R": min(GROUP, chosen.block_r, max(16, power_of_two(rank if eight is None else eight))),
        "BLOCK_FOUR": 0 if eight is None else min(GROUP_OF_FOUR, chosen.block_r, max(16, power_of_two(rank - eight))),
        "ALIGN": align,
        "PRECISION": "ieee" if exact else "tf32",
    }
    return Plan(constants, 4 if together * block_n < 128 else chosen.warps, chosen.stages)


def _check(
    key_out: Tensor, value_out: Tensor, rows: Tensor, scales: Tensor | None, slots: Tensor, num_keys: Tensor | None,
    w_kvb: Tensor, b_kvb: Tensor, w_pe: Tensor | None, b_pe: Tensor | None, rotations: Tensor | None,
    rotate_heads: bool, eight: int | None = None,
) -> None:  # fmt: skip
    dtype = w_kvb.dtype
    check_tensor("key_out", key_out, (None,) * 4, dtype)
    batch, capacity, heads, key_width = key_out.shape
    check_tensor("value_out", value_out, (batch, capacity, heads, None), dtype, like=key_out)
    check_tensor("w_kvb", w_kvb, (None, None), dtype, like=key_out)
    weight_rows, rank = w_kvb.shape
    check_ring(rows, scales, slots, batch, dtype, key_out, rank, eight)
    if num_keys is not None:
        check_tensor("num_keys", num_keys, (1,), torch.int32, like=rows)
    check_tensor("b_kvb", b_kvb, (weight_rows,), dtype, like=rows)
    value_channels, width = value_out.shape[3], rows.shape[3]
    nope = weight_rows // heads - value_channels
    shared = key_width - nope
    fits = (
        weight_rows == heads * (nope + value_channels) and nope >= 0 and (shared == 0 if rotate_heads else shared >= 0)
    )
    require(fits, "w_kvb has {} rows and does not fit {} heads of {} key and {} value channels",
            weight_rows, heads, key_width, value_channels)  # fmt: skip
    require(w_kvb.stride(0) == rank and b_kvb.stride(0) == 1, "w_kvb and b_kvb must be contiguous")
    refuse(why_not_expand_kv(rank, nope, shared, value_channels, dtype))
    require(not rotate_heads or key_width % 2 == 0, "{} key channels cannot be rotated; use an even number", key_width)
    if shared and w_pe is not None:
        check_tensor("w_pe", w_pe, (shared, rank), dtype, like=rows)
        require(w_pe.stride(0) == rank, "w_pe must be contiguous")
        if b_pe is not None:
            check_tensor("b_pe", b_pe, (shared,), dtype, like=rows)
    expected = row_width(rank, shared if w_pe is None else 0, eight)
    require(width >= expected, "rows are {} wide, expected at least {}", width, expected)
    if rotate_heads or shared:
        require(rotations is not None, "rotations are missing")
        pairs = (key_width if rotate_heads else shared) // 2
        check_tensor("rotations", rotations, (slots.shape[-1] * rows.shape[2], pairs, 2), torch.float32, like=rows)
        require(rotations.stride(1) == 2 or pairs == 1, "the pairs of rotations must be contiguous")


def _launch(
    key_out, value_out, rows, scales, slots, num_keys, w_kvb, b_kvb, w_pe, b_pe, rotations, rotate_heads, eight=None
):  # fmt: skip
    heads, value_channels = key_out.shape[2], value_out.shape[3]
    nope = w_kvb.shape[0] // heads - value_channels
    shared = key_out.shape[3] - nope
    source, both = (rows, scales, slots, num_keys), nope + value_channels
    if nope:
        _product(key_out, nope, heads, *source, w_kvb, b_kvb, both, rotations if rotate_heads else None, eight)
    _product(value_out, value_channels, heads, *source, w_kvb[nope:], b_kvb[nope:], both, None, eight)
    if shared and w_pe is None:
        copy_rows(key_out[..., nope:], *source, row_parts(w_kvb.shape[1], shared, eight)[2], rotations)
    elif shared:
        _product(key_out[..., nope:], shared, 1, *source, w_pe, b_pe, 0, rotations, eight)


def _product(out, channels, heads, rows, scales, slots, num_keys, weight, bias, head_rows, rotations, eight=None):
    """Launch one product: for every head, with weights `head_rows` rows apart, or one that all heads of `out` share."""
    rank, tokens = weight.shape[1], rows.shape[2]
    keys = min(slots.shape[-1] * tokens, out.shape[1])
    plan = expand_plan(rank, channels, heads, out.dtype, capability(rows.device), eight, row_align(rows))
    groups = ceil_div(heads, plan.constants["HEADS"]) * plan.constants["TILES"]
    launch(
        _expand_kernel, (groups, ceil_div(keys, plan.constants["BLOCK_M"]), out.shape[0]), plan, out,
        out, rows, scales, slots, num_keys, weight, bias, rotations, tokens, keys, heads, out.shape[2] // heads,
        *out.stride()[:3], *ring_strides(rows, scales, slots), head_rows,
        0 if rotations is None else rotations.stride(0),
    )  # fmt: skip


define(
    "expand_kv_",
    "(Tensor(a!) key_out, Tensor(b!) value_out, Tensor rows, Tensor? scales, Tensor slots, Tensor? num_keys, "
    "Tensor w_kvb, Tensor b_kvb, Tensor? w_pe, Tensor? b_pe, Tensor? rotations, bool rotate_heads, "
    "int? eight=None) -> ()",
    _launch,
    expand_kv_reference,
    lambda *arguments: None,
    mutates=("key_out", "value_out"),
)
