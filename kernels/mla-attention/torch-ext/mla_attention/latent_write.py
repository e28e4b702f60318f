"""Compute the cache rows of new tokens from their projected keys and values, and write them to slots of the ring.

QK-norm over all heads is one scalar per token, so one pass over the keys suffices: the product with `kv_a_proj`
accumulates the unnormalized keys, their sum of squares is accumulated beside it, and the scalar is applied before the
values are added. Shape letters: B batch, S slots, T tokens per frame, F frames written, N = F T tokens, H heads, D key
and V value channels, r `kv_lora_rank`, R shared rotary channels, W = r + R.
"""

from __future__ import annotations

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
    refuse,
    require,
    tile_family,
    tl,
    why_not_dtype,
)
from .common import rotate, rotate_pairs
from .quantize import GROUP, LEVELS, LEVELS_OF_FOUR, MAX_SCALE, quantize_rows, row_width
from .ring import check_ring, ring_index, ring_strides, row_align

MAX_RANK = 2048
MAX_SHARED = 128


@jit
def _channels(source, inside, c, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Channels `c` of some rows; zeros from SIZE on and where not `inside`."""
    mask = inside[:, None]
    if SIZE % BLOCK != 0:
        mask = mask & (c < SIZE)[None, :]
    return tl.load(source[:, None] + c[None, :], mask=mask, other=0.0)


@jit
def _vector(source, c, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Entries `c` of a vector in float32; zeros from SIZE on."""
    if SIZE % BLOCK != 0:
        return tl.load(source + c, mask=c < SIZE, other=0.0).to(tl.float32)
    return tl.load(source + c).to(tl.float32)


@jit
def _squares(key, inside, KEYS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum of squares of each key."""
    squares = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, KEYS, BLOCK_C):
        k = _channels(key, inside, start + tl.arange(0, BLOCK_C), KEYS, BLOCK_C).to(tl.float32)
        squares += tl.sum(k * k, 1)
    return squares


@jit
def _add_keys(
    acc, key, inside, norm, gain, mean, grid, weight, used, count,
    KEYS: tl.constexpr, D: tl.constexpr, PLACED: tl.constexpr, NORM_FIRST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the product of the keys with some weight rows to `acc`; also return the sum of squares of each key.

    PLACED rotates by `grid`. NORM_FIRST applies `norm` before the product. If `mean` is given, it is subtracted. Only
    the first `count` channels are read: all or none.
    """
    squares = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, count, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        tile = _channels(key, inside, c, KEYS, BLOCK_C)
        k = tile.to(tl.float32)
        squares += tl.sum(k * k, 1)
        if NORM_FIRST:
            k = k * norm[:, None]
        k = k * _vector(gain, c, KEYS, BLOCK_C)[None, :]
        if mean is not None:
            k = k - _vector(mean, c, KEYS, BLOCK_C)[None, :]
        if PLACED:
            turn = tl.load(grid[:, None] + (c % D)[None, :], mask=inside[:, None], other=0.0)
            k = rotate_pairs(k, turn, BLOCK_N, BLOCK_C)
        w = _channels(weight, used, c, KEYS, BLOCK_C)
        acc = tl.dot(k.to(tile.dtype), w.T, acc, input_precision=PRECISION)
    return acc, squares


@jit
def _quantized(x, LEVELS: tl.constexpr, MAX_SCALE: tl.constexpr):
    """Steps, in float32, and float16 scales of groups along the last axis, as in quantize_rows."""
    axis: tl.constexpr = len(x.shape) - 1
    # Round the scale before dividing, then round half to even.
    scale = tl.minimum(tl.max(tl.abs(x), axis) / LEVELS, MAX_SCALE).to(tl.float16)
    step = tl.expand_dims(scale.to(tl.float32), axis)
    x = tl.where(step > 0, tl.div_rn(x, tl.where(step > 0, step, 1.0)), 0.0)
    x = (x + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(x, -LEVELS), LEVELS), scale


@jit(do_not_specialize=["length", "slots_b"])
def _write_kernel(
    rows, scales, slots, key, value, gain, mean, w_kv, b_kv, w_pe, b_pe, grid, eps, tokens, length,
    rows_b, rows_s, rows_t, scales_b, scales_s, scales_t, slots_b,
    key_b, key_n, value_b, value_n, grid_n,
    RANK: tl.constexpr, SHARED: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, D: tl.constexpr,
    NORM_FIRST: tl.constexpr, QUANTISED: tl.constexpr, EIGHT: tl.constexpr, LEVELS: tl.constexpr,
    LEVELS_OF_FOUR: tl.constexpr, MAX_SCALE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_W channels of the rows of BLOCK_N tokens; if QUANTISED, these channels are one group.

    Where only the first EIGHT latents have 8 bits, every part of a row begins a block, and a block of the latents in 4
    bits is two groups. Rows begin at multiples of ALIGN.
    """
    block = tl.program_id(0)
    first, end = block * BLOCK_W, RANK + SHARED
    if EIGHT is not None:
        IN_FOUR: tl.constexpr = (EIGHT + BLOCK_W - 1) // BLOCK_W
        IN_KEY: tl.constexpr = IN_FOUR + (RANK - EIGHT + BLOCK_W - 1) // BLOCK_W
        in_four = (block >= IN_FOUR) & (block < IN_KEY)
        if block >= IN_KEY:
            first = RANK + (block - IN_KEY) * BLOCK_W
        elif block >= IN_FOUR:
            first, end = EIGHT + (block - IN_FOUR) * BLOCK_W, RANK
        else:
            end = EIGHT
    w = first + tl.arange(0, BLOCK_W)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(2).to(tl.int64)
    inside = n < length
    position = n.to(tl.int64)
    keys = key + b * key_b + position * key_n
    places = grid
    if grid is not None:
        places = grid + position * grid_n
    norm = tl.zeros([BLOCK_N], tl.float32)
    if NORM_FIRST:
        norm = tl.rsqrt(_squares(keys, inside, KEYS, BLOCK_N, BLOCK_C) / KEYS + eps)
    acc = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    latent = w < tl.minimum(RANK, end)
    weights = w_kv + w.to(tl.int64) * (KEYS + VALUES)
    acc, squares = _add_keys(
        acc, keys, inside, norm, gain, mean, places, weights, latent, tl.where(first < RANK, KEYS, 0),
        KEYS, D, grid is not None, NORM_FIRST, BLOCK_N, BLOCK_C, PRECISION,
    )  # fmt: skip
    bias = tl.load(b_kv + w, mask=latent, other=0.0).to(tl.float32)
    if SHARED > 0:
        shared = (w >= RANK) & (w < end)
        acc, again = _add_keys(
            acc, keys, inside, norm, gain, mean, places, w_pe + (w - RANK).to(tl.int64) * KEYS, shared,
            tl.where(tl.minimum(first + BLOCK_W, end) > RANK, KEYS, 0),
            KEYS, D, False, NORM_FIRST, BLOCK_N, BLOCK_C, PRECISION,
        )  # fmt: skip
        # A block with both kinds of channels has read the keys twice.
        squares = tl.maximum(squares, again)
        if b_pe is not None:
            bias += tl.load(b_pe + (w - RANK), mask=shared, other=0.0).to(tl.float32)
    if not NORM_FIRST:
        acc = acc * tl.rsqrt(squares / KEYS + eps)[:, None]
    values = value + b * value_b + position * value_n
    for start in range(0, tl.where(first < RANK, VALUES, 0), BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        tile = _channels(values, inside, c, VALUES, BLOCK_C)
        weight = _channels(weights + KEYS, latent, c, VALUES, BLOCK_C)
        acc = tl.dot(tile, weight.T, acc, input_precision=PRECISION)
    acc += bias[None, :]

    slot = tl.load(slots + b * slots_b + n // tokens, mask=inside, other=0).to(tl.int64)
    token = n % tokens
    # Strides that 16 does not divide, as of 24 + 32 bytes, would otherwise be unknown and every store a byte.
    target = rows + tl.multiple_of(b * rows_b + slot * rows_s + token * rows_t, ALIGN)
    place = w
    if QUANTISED:
        steps = scales + b * scales_b + slot * scales_s + token * scales_t
        if EIGHT is not None:
            SCALES_OF_FOUR: tl.constexpr = (RANK - EIGHT + 31) // 32
            if in_four:
                of_four, found = _quantized(tl.reshape(acc, [BLOCK_N, 2, BLOCK_W // 2]), LEVELS_OF_FOUR, MAX_SCALE)
                low, high = tl.split(tl.reshape(of_four.to(tl.int32), [BLOCK_N, BLOCK_W // 2, 2]))
                byte = (first - EIGHT) // 2 + tl.arange(0, BLOCK_W // 2)
                mask = inside[:, None] & (byte < (RANK - EIGHT) // 2)[None, :]
                tl.store(target[:, None] + (EIGHT + byte)[None, :], (high * 16 | low & 15).to(tl.int8), mask=mask)
                group = (block - IN_FOUR) * 2 + tl.arange(0, 2)
                mask = inside[:, None] & (group < SCALES_OF_FOUR)[None, :]
                tl.store(steps[:, None] + (IN_FOUR + group)[None, :], found, mask=mask)
                return
            if block >= IN_KEY:
                block += SCALES_OF_FOUR - (IN_KEY - IN_FOUR)
                place = w - (RANK - EIGHT) // 2
        acc, found = _quantized(acc, LEVELS, MAX_SCALE)
        tl.store(steps + block, found, mask=inside)
    mask = inside[:, None] & (w < end)[None, :]
    tl.store(target[:, None] + place[None, :], acc.to(rows.dtype.element_ty), mask=mask)


def latent_write_(
    rows: Tensor, scales: Tensor | None, slots: Tensor, key: Tensor, value: Tensor, norm_weight: Tensor, eps: float,
    key_mean: Tensor | None, w_kv: Tensor, b_kv: Tensor, w_pe: Tensor | None, b_pe: Tensor | None,
    grid: Tensor | None, heads: int, eight: int | None = None,
) -> None:  # fmt: skip
    """Write `[c | k_pe]` of the tokens of F frames to `rows` at `slots`, in place.

    `rows` are `[B, S, T, W]`, or `[1, S, T, W]` if all items share a ring, in the dtype of the keys, or int8 with
    float16 `scales` `[B or 1, S, T, ceil(W / 64)]` in the format of `quantize_rows`. With `eight`, this is the format
    with the first `eight` latents in 8 bits, the others in 4 and the shared key in 8. `slots` is int32 `[F]` for all
    items, or `[B, F]`. No two frames may be written to the same slot of a ring.

    `key` `[B, N, H D]` is the key before QK-norm and `value` `[B, N, H V]` the value, N = F T, frame by frame. With
    `k = RMSNorm(key) * norm_weight - key_mean`, where the norm covers all heads together and uses `eps`:
    `c = w_kv [placed; value] + b_kv`, `w_kv` `[r, H D + H V]`, and `k_pe = w_pe k + b_pe`, `w_pe` `[R, H D]`.
    `placed` is k with the pairs of every head rotated by `grid`, float32 `[N, D / 2, 2]` (cos, sin), or k itself
    without `grid`. Without `w_pe`, R is 0.

    Keys, values and weights share a dtype; norm, sums and rotations are float32. Raises ValueError for arguments that
    do not fit, NotImplementedError for what `why_not_latent_write` rejects.
    """
    _check(rows, scales, slots, key, value, norm_weight, key_mean, w_kv, b_kv, w_pe, b_pe, grid, heads, eight)
    ops.latent_write_(
        rows, scales, slots, key, value, norm_weight, eps, key_mean, w_kv, b_kv, w_pe, b_pe, grid, heads, eight
    )  # fmt: skip


def latent_write_reference(
    rows: Tensor, scales: Tensor | None, slots: Tensor, key: Tensor, value: Tensor, norm_weight: Tensor, eps: float,
    key_mean: Tensor | None, w_kv: Tensor, b_kv: Tensor, w_pe: Tensor | None, b_pe: Tensor | None,
    grid: Tensor | None, heads: int, eight: int | None = None,
) -> None:  # fmt: skip
    """`latent_write_` in plain torch, computed in float64 for float64 keys, else in float32."""
    wide = torch.promote_types(key.dtype, torch.float32)
    k = key.to(wide)
    k = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + eps) * norm_weight.to(wide)
    if key_mean is not None:
        k = k - key_mean.to(wide)
    placed = k
    if grid is not None:
        placed = rotate(k.unflatten(-1, (heads, -1)), grid).flatten(2)
    found = F.linear(torch.cat([placed, value.to(wide)], dim=-1), w_kv.to(wide), b_kv.to(wide))
    if w_pe is not None:
        shared = F.linear(k, w_pe.to(wide), None if b_pe is None else b_pe.to(wide))
        found = torch.cat([found, shared], dim=-1)
    found, place = found.unflatten(1, (slots.shape[-1], -1)), ring_index(rows, slots, len(key))
    if scales is None:
        rows[place] = found.to(rows.dtype)
    else:
        rows[place], scales[place] = quantize_rows(found, eight, len(w_kv))


def why_not_latent_write(
    rank: int, shared_channels: int, head_dim: int, dtype: torch.dtype | None = None
) -> str | None:
    """Why `latent_write_` does not support r, R, D or this dtype, in one line; None if it does."""
    if not 1 <= rank <= MAX_RANK:
        return f"latent_write: kv_lora_rank {rank}; supported: 1 to {MAX_RANK}"
    if not 0 <= shared_channels <= MAX_SHARED:
        return f"latent_write: {shared_channels} shared rotary channels; supported: 0 to {MAX_SHARED}"
    if head_dim % 2:
        return f"latent_write: {head_dim} key channels per head cannot be rotated; use an even number"
    return why_not_dtype("latent_write", dtype)


def write_plan(
    rank: int, shared: int, keys: int, values: int, head_dim: int, mean: bool, quantized: bool, dtype: torch.dtype,
    capability: int, eight: int | None = None, align: int = 16,
) -> Plan:  # fmt: skip
    """Tiles of tokens by one group of channels; `keys` and `values` count the channels of all heads.

    With `eight`, the first `eight` latents have 8 bits and the others 4, two groups to a tile. Rows begin at multiples
    of `align` scalars.
    """
    exact = dtype == torch.float32
    constants = {
        "RANK": rank,
        "SHARED": shared,
        "KEYS": keys,
        "VALUES": values,
        "D": head_dim,
        # A mean is subtracted from normalized keys, and unnormalized keys may overflow float16: norm first, two reads.
        "NORM_FIRST": mean or dtype == torch.float16,
        "QUANTISED": quantized,
        "EIGHT": eight,
        "LEVELS": LEVELS,
        "LEVELS_OF_FOUR": LEVELS_OF_FOUR,
        "MAX_SCALE": MAX_SCALE,
        "ALIGN": align,
        "BLOCK_N": 32 if exact else 64,
        "BLOCK_W": GROUP,
        "BLOCK_C": 32 if exact else 64,
        "PRECISION": "ieee" if exact else "tf32",
    }
    if exact:
        return Plan(constants, 4, 1)
    return Plan(constants, 4, 3) if tile_family(capability) == 80 else Plan(constants, 8, 4)


def _check(
    rows: Tensor, scales: Tensor | None, slots: Tensor, key: Tensor, value: Tensor, norm_weight: Tensor,
    key_mean: Tensor | None, w_kv: Tensor, b_kv: Tensor, w_pe: Tensor | None, b_pe: Tensor | None,
    grid: Tensor | None, heads: int, eight: int | None = None,
) -> None:  # fmt: skip
    dtype = key.dtype
    check_tensor("key", key, (None,) * 3, dtype)
    batch = key.shape[0]
    check_tensor("w_kv", w_kv, (None, None), dtype, like=key)
    rank, shared = len(w_kv), 0 if w_pe is None else len(w_pe)
    check_ring(rows, scales, slots, batch, dtype, key, rank, eight)
    tokens, width = rows.shape[2:]
    alone = batch == 1 or rows.shape[0] == batch or slots.dim() == 2
    require(alone, "items that share a ring cannot write to the same slots: give each a table of its own")
    length = slots.shape[-1] * tokens
    check_tensor("key", key, (batch, length, None), dtype, like=rows)
    check_tensor("value", value, (batch, length, None), dtype, like=rows)
    keys, values = key.shape[2], value.shape[2]
    require(heads >= 1 and keys % heads == 0, "{} key channels are not divisible by {} heads", keys, heads)
    check_tensor("w_kv", w_kv, (None, keys + values), dtype, like=rows)
    refuse(why_not_latent_write(rank, shared, keys // heads, dtype))
    expected = row_width(rank, shared, eight)
    require(width == expected, "rows are {} wide, expected {}", width, expected)
    check_tensor("b_kv", b_kv, (rank,), dtype, like=rows)
    check_tensor("norm_weight", norm_weight, (keys,), dtype, like=rows)
    require(w_kv.stride(0) == keys + values or rank == 1, "w_kv must be contiguous")
    if key_mean is not None:
        check_tensor("key_mean", key_mean, (keys,), dtype, like=rows)
    if w_pe is not None:
        check_tensor("w_pe", w_pe, (shared, keys), dtype, like=rows)
        require(w_pe.stride(0) == keys or shared == 1, "w_pe must be contiguous")
        if b_pe is not None:
            check_tensor("b_pe", b_pe, (shared,), dtype, like=rows)
    if grid is not None:
        pairs = keys // heads // 2
        check_tensor("grid", grid, (length, pairs, 2), torch.float32, like=rows)
        require(grid.stride(1) == 2 or pairs == 1, "the pairs of grid must be contiguous")


def _launch(
    rows, scales, slots, key, value, norm_weight, eps, key_mean, w_kv, b_kv, w_pe, b_pe, grid, heads, eight=None
):  # fmt: skip
    batch, length, keys = key.shape
    rank, shared, values = w_kv.shape[0], 0 if w_pe is None else w_pe.shape[0], value.shape[2]
    plan = write_plan(
        rank, shared, keys, values, keys // heads, key_mean is not None, scales is not None, key.dtype,
        capability(rows.device), eight, row_align(rows),
    )  # fmt: skip
    parts = [rank + shared] if eight is None else [eight, rank - eight, shared]
    blocks = sum(ceil_div(part, plan.constants["BLOCK_W"]) for part in parts)
    launch(
        _write_kernel, (blocks, ceil_div(length, plan.constants["BLOCK_N"]), batch), plan, rows,
        rows, scales, slots, key, value, norm_weight, key_mean, w_kv, b_kv, w_pe, None if w_pe is None else b_pe,
        grid, eps, rows.shape[2], length,
        *ring_strides(rows, scales, slots), *key.stride()[:2], *value.stride()[:2],
        0 if grid is None else grid.stride(0),
    )  # fmt: skip


define(
    "latent_write_",
    "(Tensor(a!) rows, Tensor(b!)? scales, Tensor slots, Tensor key, Tensor value, Tensor norm_weight, float eps, "
    "Tensor? key_mean, Tensor w_kv, Tensor b_kv, Tensor? w_pe, Tensor? b_pe, Tensor? grid, int heads, "
    "int? eight=None) -> ()",
    _launch,
    latent_write_reference,
    lambda *arguments: None,
    mutates=("rows", "scales"),
)
