"""One step of the online softmax of `latent_attention`: a tile of queries attends to a block of cached rows.

Rows are gathered from the ring, dequantized and rotated, or they are packed, or descriptors load packed ones. Shape
letters as in `latent_attention.py`.
"""

from __future__ import annotations

from ._runtime import jit, tl
from .common import rotate_pairs, softmax_step


@jit
def channel_mask(inside, START: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """Mask of the existing channels in `[START, START + BLOCK)`, by row; one column if all exist."""
    mask = inside[:, None]
    if START + BLOCK > SIZE:
        mask = mask & (START + tl.arange(0, BLOCK) < SIZE)[None, :]
    return mask


@jit
def _channels(
    rows, offsets, live, FIRST: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Channels `[START, START + BLOCK)` of the SIZE from FIRST on; zeros past SIZE and, if MASKED, where not `live`."""
    source = rows + offsets[:, None] + (FIRST + START + tl.arange(0, BLOCK))[None, :]
    if MASKED or START + BLOCK > SIZE:
        return tl.load(source, mask=channel_mask(live, START, BLOCK, SIZE), other=0)
    return tl.load(source)


@jit
def _latents(
    rows, offsets, scales, scale_offsets, live, DTYPE: tl.constexpr, START: tl.constexpr, RANK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Channels `[START, START + BLOCK)` of the latents of some keys, dequantized if there are scales."""
    tile = _channels(rows, offsets, live, 0, START, BLOCK, RANK, MASKED)
    if scales is not None:
        # The block holds whole groups or lies within one.
        GROUPS: tl.constexpr = (BLOCK + 63) // 64
        g = START // 64 + tl.arange(0, GROUPS)
        mask = live[:, None] & (g * 64 < RANK)[None, :]
        steps = tl.load(scales + scale_offsets[:, None] + g[None, :], mask=mask, other=0.0).to(tl.float32)
        tile = tl.reshape(tile.to(tl.float32), [BLOCK_K, GROUPS, BLOCK // GROUPS]) * steps[:, :, None]
        tile = tl.reshape(tile, [BLOCK_K, BLOCK]).to(DTYPE)
    return tile


@jit
def _shared_keys(
    rows, offsets, scales, scale_offsets, turns, live, DTYPE: tl.constexpr, RANK: tl.constexpr,
    SHARED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Shared keys of some rows, dequantized and rotated by `turns`; `turns` None: packed rows are both already."""
    k = _channels(rows, offsets, live, RANK, 0, BLOCK, SHARED, MASKED)
    if turns is not None:
        c = tl.arange(0, BLOCK)
        mask = channel_mask(live, 0, BLOCK, SHARED)
        k = k.to(tl.float32)
        if scales is not None:
            steps = scales + scale_offsets[:, None] + ((RANK + c) // 64)[None, :]
            k *= tl.load(steps, mask=mask, other=0.0).to(tl.float32)
        turn = tl.load(turns[:, None] + c[None, :], mask=mask, other=0.0)
        k = rotate_pairs(k, turn, BLOCK_K, BLOCK).to(DTYPE)
    return k


@jit
def latent_block(
    query, pe, acc, total, top, start, last, rows, scales, slots, rotations, tokens, scale_log2,
    rows_s, rows_t, scales_s, scales_t, rotations_k,
    RANK: tl.constexpr, WIDE: tl.constexpr, COUNT: tl.constexpr, REST: tl.constexpr, BLOCKS: tl.constexpr,
    SHARED: tl.constexpr, PE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PACKED: tl.constexpr,
    FAR: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the keys from `start` on; `top` is in units of log2.

    RANK and SHARED describe the rows, so they include the padding if PACKED.
    """
    DTYPE: tl.constexpr = query[0].dtype
    n = start + tl.arange(0, BLOCK_K)
    live = n < last
    if PACKED:
        WIDTH: tl.constexpr = RANK + SHARED
        rows += tl.cast(start, tl.int64) * WIDTH
        offsets = tl.arange(0, BLOCK_K) * WIDTH
        scale_offsets = offsets
    else:
        slot = tl.load(slots + n // tokens, mask=live, other=0)
        if FAR:
            slot = slot.to(tl.int64)
        offsets = slot * rows_s + n % tokens * rows_t
        scale_offsets = slot * scales_s + n % tokens * scales_t
    logits = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    if SHARED > 0:
        turns = rotations
        if rotations is not None:
            turns = rotations + n * rotations_k
        k = _shared_keys(rows, offsets, scales, scale_offsets, turns, live, DTYPE, RANK, SHARED, PE, BLOCK_K, MASKED)
        logits = tl.dot(pe, k.T, logits, input_precision=PRECISION)
    latents = ()
    for i in tl.static_range(BLOCKS):
        c = _latents(
            rows, offsets, scales, scale_offsets, live, DTYPE, i * WIDE, RANK, WIDE if i < COUNT else REST,
            BLOCK_K, MASKED,
        )  # fmt: skip
        logits = tl.dot(query[i], c.T, logits, input_precision=PRECISION)
        latents = latents + (c,)  # noqa: RUF005
    weights, shrink, total, highest = softmax_step(logits, total, top, scale_log2, live, MASKED)
    weights = weights.to(DTYPE)
    mixed = ()
    for i in tl.static_range(BLOCKS):
        part = tl.dot(weights, latents[i], acc[i] * shrink[:, None], input_precision=PRECISION)
        mixed = mixed + (part,)  # noqa: RUF005
    return mixed, total, highest


@jit
def described_logits(query, pe, row_tiles, pe_tiles, row, WIDE: tl.constexpr, SHARED: tl.constexpr):
    """Logits of the packed rows from `row` on; descriptors load the latents in one block, then the shared keys."""
    # Wait for both loads before the first product: a barrier between the products would serialize them.
    c = row_tiles.load([row, 0])
    if SHARED > 0:
        k = pe_tiles.load([row, WIDE])
        return tl.dot(query, c.T, tl.dot(pe, k.T))
    else:
        return tl.dot(query, c.T)


@jit
def described_mix(logits, acc, total, top, scale_log2, row_tiles, row, live, MASKED: tl.constexpr):
    """One step of the online softmax over the packed rows from `row` on; `top` is in units of log2."""
    weights, shrink, total, highest = softmax_step(logits, total, top, scale_log2, live, MASKED)
    c = row_tiles.load([row, 0])
    if MASKED:
        c = tl.where(live[:, None], c, 0.0)
    return tl.dot(weights.to(c.dtype), c, acc * shrink[:, None]), total, highest
