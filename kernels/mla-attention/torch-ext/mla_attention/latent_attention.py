"""Absorbed attention: queries in latent space attend to the cached rows themselves; nothing is expanded.

The logit of a key is `q_latent . c + q_pe . rotated(k_pe)` and its value is its latent c, so all heads share the rows
(DeepSeek-V2, arXiv 2405.04434, section 2.1.2). A tile holds several queries with all their heads, so each row is loaded
once for all of them. With few queries, tiles gather rows from the ring, dequantize and rotate them. With many, the rows
are packed once beforehand (`pack.py`). Online softmax and splits are as in `attend.py`. Shape letters: B batch, S
slots, T tokens per frame, F frames read, K = F T keys, Q queries, H heads, r `kv_lora_rank`, R shared rotary channels,
W row width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._ops import ops
from ._runtime import (
    capability,
    ceil_div,
    check_tensor,
    define,
    jit,
    launch,
    refuse,
    require,
    tl,
    why_not_dtype,
)
from .common import rotate, valid_keys
from .descriptors import describable, describe
from .latent_step import channel_mask, described_logits, described_mix, latent_block
from .latent_tiles import MAX_RANK, latent_plan, row_widths
from .merge import launch_merge
from .pack import packed_rows
from .quantize import dequantize_rows, row_width
from .ring import check_ring, ring_index, ring_strides
from .splits import programs, split_count

MAX_SHARED = 64
MAX_SPLITS = 64
TILES = {
    "query_tiles": ("BLOCK_M", "WIDE"),
    "query_pe_tiles": ("BLOCK_M", "PE"),
    "row_tiles": ("BLOCK_K", "WIDE"),
    "pe_tiles": ("BLOCK_K", "PE"),
}
"""Descriptor arguments of the kernel, with the constants that size their tiles."""
NEAR = 2**31
"""Number of scalars in a ring from which its offsets need 64 bits."""


@jit(do_not_specialize=["queries", "keys", "slots_b"])
def _latent_kernel(
    query, query_pe, rows, query_tiles, query_pe_tiles, row_tiles, pe_tiles, scales, slots, num_keys, rotations,
    out, lse, scale, queries, keys, heads, tokens,
    query_b, query_q, query_h, pe_b, pe_q, pe_h, rows_b, rows_s, rows_t, scales_b, scales_s, scales_t, slots_b,
    rotations_k,
    RANK: tl.constexpr, WIDE: tl.constexpr, COUNT: tl.constexpr, REST: tl.constexpr, BLOCKS: tl.constexpr,
    SHARED: tl.constexpr, PE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PACKED: tl.constexpr,
    PEELED: tl.constexpr, FAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of (query, head) by a split of the keys: `out` `[splits, B, Q, H, r]`, `lse` `[splits, B, H, Q]`.

    The latent is processed in BLOCKS blocks: COUNT of WIDE channels, then one of REST channels if REST > 0. PACKED rows
    are padded to these blocks, their shared keys to PE. FAR rings need 64-bit offsets. With PEELED, only a last partial
    block of keys is masked, in separate code. If there are descriptors (the four `tiles`), they load packed rows whose
    latent is one block.
    """
    b = tl.program_id(1).to(tl.int64)
    valid = valid_keys(num_keys, keys)
    share = tl.cdiv(tl.cdiv(valid, BLOCK_K), tl.num_programs(2)) * BLOCK_K
    first = tl.minimum(tl.program_id(2) * share, valid)
    last = tl.minimum(first + share, valid)

    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < queries * heads
    q = (m // heads).to(tl.int64)
    h = m % heads
    if row_tiles is not None:
        row = (b * queries * heads).to(tl.int32) + tl.program_id(0) * BLOCK_M
        described = query_tiles.load([row, 0])
        pe = described
        if SHARED > 0:
            pe = query_pe_tiles.load([row, 0])
        mixed = tl.zeros([BLOCK_M, WIDE], tl.float32)
    else:
        source = query + b * query_b + (q * query_q + h * query_h)[:, None]
        # Triton does not support starred expressions.
        latent = ()
        acc = ()
        for i in tl.static_range(BLOCKS):
            c = i * WIDE + tl.arange(0, WIDE if i < COUNT else REST)
            part = tl.load(
                source + c[None, :], mask=channel_mask(inside, i * WIDE, WIDE if i < COUNT else REST, RANK), other=0.0
            )
            latent = latent + (part,)  # noqa: RUF005
            acc = acc + (tl.zeros([BLOCK_M, WIDE if i < COUNT else REST], tl.float32),)  # noqa: RUF005
        pe = latent[0]
        if SHARED > 0:
            source = query_pe + b * pe_b + (q * pe_q + h * pe_h)[:, None] + tl.arange(0, PE)[None, :]
            pe = tl.load(source, mask=channel_mask(inside, 0, PE, SHARED), other=0.0)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    scale_log2 = scale * 1.4426950408889634
    if row_tiles is not None:
        whole = first + (last - first) // BLOCK_K * BLOCK_K
        origin = (b * keys).to(tl.int32)
        for start in range(first, whole, BLOCK_K):
            logits = described_logits(described, pe, row_tiles, pe_tiles, origin + start, WIDE, SHARED)
            mixed, total, top = described_mix(
                logits, mixed, total, top, scale_log2, row_tiles, origin + start, inside, False
            )  # fmt: skip
        if whole < last:
            live = tl.arange(0, BLOCK_K) < last - whole
            logits = described_logits(described, pe, row_tiles, pe_tiles, origin + whole, WIDE, SHARED)
            mixed, total, top = described_mix(
                logits, mixed, total, top, scale_log2, row_tiles, origin + whole, live, True
            )  # fmt: skip
        acc = (mixed,)
    else:
        rows += b * rows_b
        if scales is not None:
            scales += b * scales_b
        if slots is not None:
            slots += b * slots_b
        ROW_RANK: tl.constexpr = COUNT * WIDE + REST if PACKED else RANK
        ROW_SHARED: tl.constexpr = PE if PACKED else SHARED
        stop = last
        if PEELED:
            stop = first + (last - first) // BLOCK_K * BLOCK_K
        for start in range(first, stop, BLOCK_K):
            acc, total, top = latent_block(
                latent, pe, acc, total, top, start, last, rows, scales, slots, rotations, tokens, scale_log2,
                rows_s, rows_t, scales_s, scales_t, rotations_k, ROW_RANK, WIDE, COUNT, REST, BLOCKS, ROW_SHARED, PE,
                BLOCK_M, BLOCK_K, PACKED, FAR, not PEELED, PRECISION,
            )  # fmt: skip
        if stop < last:
            acc, total, top = latent_block(
                latent, pe, acc, total, top, stop, last, rows, scales, slots, rotations, tokens, scale_log2,
                rows_s, rows_t, scales_s, scales_t, rotations_k, ROW_RANK, WIDE, COUNT, REST, BLOCKS, ROW_SHARED, PE,
                BLOCK_M, BLOCK_K, PACKED, FAR, True, PRECISION,
            )  # fmt: skip

    # Without keys, the sums and the output are 0.
    total_or_one = tl.where(total > 0, total, 1.0)
    found = tl.where(total > 0, (top + tl.log2(total_or_one)) * 0.6931471805599453, float("-inf"))
    item = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + b
    tl.store(lse + (item * heads + h) * queries + q, found, mask=inside)
    target = out + (item * queries * heads + m)[:, None] * RANK
    for i in tl.static_range(BLOCKS):
        mixed = (acc[i] / total_or_one[:, None]).to(out.dtype.element_ty)
        c = i * WIDE + tl.arange(0, WIDE if i < COUNT else REST)
        tl.store(target + c[None, :], mixed, mask=channel_mask(inside, i * WIDE, WIDE if i < COUNT else REST, RANK))


def latent_attention(
    query_latent: Tensor, query_pe: Tensor | None, rows: Tensor, scales: Tensor | None, slots: Tensor,
    num_keys: Tensor | None, rotations: Tensor | None, scale: float, splits: int = 0, eight: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Absorbed attention to cached rows: `(out [B, Q, H, r], lse [B, H, Q])`.

    `out` holds mixed latents in the dtype of the queries, `lse` the natural log-sum-exp in float32. Without valid keys
    they are 0 and -inf.

    `query_latent` `[B, Q, H, r]` are the queries times the key part of `kv_b_proj`; `query_pe` `[B, Q, H, R]` is their
    rotated shared part, or None. Both are float16, bfloat16 or float32, with contiguous channels and any other strides.
    `rows`, W >= r + R, hold `[c | k_pe]`: `[B, S, T, W]` with a ring per item, or `[1, S, T, W]` with one ring for all.
    They have the dtype of the queries, or int8 with float16 `scales` `[B or 1, S, T, ceil(W / 64)]`. Key j is token
    `j % T` of slot `slots[j // T]`; `slots` is int32 `[F]` for all items, or `[B, F]`. Keys from `num_keys` (int32
    `[1]`, on the device; None: all are valid) on are not read. `rotations`, float32 `[K, R / 2, 2]` (cos, sin), rotate
    `k_pe`, in reading order. `scale` > 0 multiplies the logits; softmax and sums are float32. `splits` programs share
    the keys of a tile; 0 lets `split_count` choose. With `eight`, the first `eight` latents of int8 rows have 8 bits,
    the others 4 and the shared key 8, as in `quantize_rows`; such rows are packed for few queries, too.

    Raises ValueError for arguments that do not fit, NotImplementedError for what `why_not_latent_attention` rejects.
    """
    _check(query_latent, query_pe, rows, scales, slots, num_keys, rotations, scale, splits, eight)
    return ops.latent_attention(query_latent, query_pe, rows, scales, slots, num_keys, rotations, scale, splits, eight)


def latent_attention_reference(
    query_latent: Tensor, query_pe: Tensor | None, rows: Tensor, scales: Tensor | None, slots: Tensor,
    num_keys: Tensor | None, rotations: Tensor | None, scale: float, splits: int = 0, eight: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`latent_attention` in plain torch, in float64 for float64 inputs, else in float32; lse has the computed dtype.

    It holds all logits in memory; `splits` does not change the result.
    """
    wide = torch.promote_types(query_latent.dtype, torch.float32)
    rank = query_latent.shape[-1]
    place = ring_index(rows, slots, len(query_latent))
    found = rows[place].flatten(1, 2)
    if scales is not None:
        found = dequantize_rows(found, scales[place].flatten(1, 2), wide, eight, rank)
    valid = torch.arange(found.shape[1], device=rows.device) < (found.shape[1] if num_keys is None else num_keys)
    # Invalid rows may be NaN, which a weight of 0 would not cancel.
    found = found.to(wide).masked_fill(~valid.unsqueeze(-1), 0)
    latent = found[..., :rank]
    logits = torch.einsum("bqhr,bkr->bhqk", query_latent.to(wide), latent)
    if query_pe is not None:
        shared = found[..., None, rank : rank + query_pe.shape[-1]]
        shared = rotate(shared, rotations.masked_fill(~valid.view(-1, 1, 1), 0)).squeeze(2)
        logits = logits + torch.einsum("bqhp,bkp->bhqk", query_pe.to(wide), shared)
    logits = (scale * logits).masked_fill(~valid, float("-inf"))
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0).unsqueeze(-1))
    return torch.einsum("bhqk,bkr->bqhr", weights, latent).to(query_latent.dtype).contiguous(), lse


def why_not_latent_attention(rank: int, shared_channels: int, dtype: torch.dtype | None = None) -> str | None:
    """Why `latent_attention` does not support r, R or this dtype, in one line; None if it does."""
    if not 1 <= rank <= MAX_RANK:
        return f"latent_attention: kv_lora_rank {rank}; supported: 1 to {MAX_RANK}"
    if shared_channels % 2:
        return f"latent_attention: {shared_channels} shared rotary channels; use an even number"
    if not 0 <= shared_channels <= MAX_SHARED:
        return f"latent_attention: {shared_channels} shared rotary channels; supported: 0 to {MAX_SHARED}"
    return why_not_dtype("latent_attention", dtype)


def _check(
    query: Tensor, query_pe: Tensor | None, rows: Tensor, scales: Tensor | None, slots: Tensor,
    num_keys: Tensor | None, rotations: Tensor | None, scale: float, splits: int, eight: int | None,
) -> None:  # fmt: skip
    check_tensor("query_latent", query, (None,) * 4)
    batch, queries, heads, rank = query.shape
    shared = 0 if query_pe is None else query_pe.shape[-1]
    require(0 <= splits <= MAX_SPLITS, "latent_attention: {} splits; supported: 0 to {}", splits, MAX_SPLITS)
    require(scale > 0, "latent_attention: scale {} is not positive", scale)
    refuse(why_not_latent_attention(rank, shared, query.dtype))
    check_ring(rows, scales, slots, batch, query.dtype, query, rank, eight)
    (tokens, width), least = rows.shape[2:], row_width(rank, shared, eight)
    require(width >= least, "rows are {} wide, expected at least {}", width, least)
    if num_keys is not None:
        check_tensor("num_keys", num_keys, (1,), torch.int32, like=query)
    if query_pe is not None:
        check_tensor("query_pe", query_pe, (batch, queries, heads, shared), query.dtype, like=query)
        require(rotations is not None, "rotations are missing")
        check_tensor("rotations", rotations, (slots.shape[-1] * tokens, shared // 2, 2), torch.float32, like=query)
        require(rotations.stride(1) == 2 or shared <= 2, "the pairs of rotations must be contiguous")


def _described(x: Tensor) -> Tensor:
    """View queries `[B, Q, H, C]` or rows `[B, K, C]` as `[1, rows, 1, C]`, the form that `describe` expects."""
    return x.view(1, -1, 1, x.shape[-1])


def _launch(query, query_pe, rows, scales, slots, num_keys, rotations, scale, splits, eight=None):
    batch, queries, heads, rank = query.shape
    tokens, shared = rows.shape[2], 0 if query_pe is None else query_pe.shape[-1]
    keys, strides = slots.shape[-1] * tokens, ring_strides(rows, scales, slots)
    far = rows.shape[1] * rows.stride(1) >= NEAR
    known = (rank, shared, queries * heads, query.dtype, scales is not None, far, capability(query.device))
    plan = latent_plan(*known, pack=eight is not None)
    if plan.described:
        query, query_pe = query.contiguous(), None if query_pe is None else query_pe.contiguous()
        aligned = all(describable(_described(x)) for x in (query, query_pe) if x is not None)
        plan = latent_plan(*known, aligned, eight is not None)
    if not shared:
        rotations = None
    if plan.constants["PACKED"]:
        widths = row_widths(plan)
        rows = packed_rows(rows, scales, slots, num_keys, rotations, batch, rank, *widths, query.dtype, eight)
        scales = slots = rotations = None
        strides = (rows.stride(0), *(0,) * 6)
    descriptors = dict.fromkeys(TILES)
    if plan.described:
        sources = (query, query_pe, rows, rows if shared else None)
        for (name, sizes), x in zip(TILES.items(), sources):  # noqa: B905
            if x is not None:
                descriptors[name] = describe(_described(x), *(plan.constants[size] for size in sizes))
    tiles = ceil_div(queries * heads, plan.constants["BLOCK_M"])
    if splits == 0:
        blocks = ceil_div(keys, plan.constants["BLOCK_K"])
        # Registers, not shared memory, limit the number of programs per multiprocessor.
        splits = split_count(tiles * batch, blocks, programs(query.device, plan, 0))
    dtype = query.dtype if splits == 1 else torch.float32
    out = torch.empty(splits, batch, queries, heads, rank, dtype=dtype, device=query.device)
    lse = torch.empty(splits, batch, heads, queries, dtype=torch.float32, device=query.device)
    launch(
        _latent_kernel, (tiles, batch, splits), plan, query,
        query, query_pe, rows, *descriptors.values(), scales, slots, num_keys, rotations, out, lse, scale, queries,
        keys, heads, tokens, *query.stride()[:3], *(query_pe.stride()[:3] if shared else (0, 0, 0)), *strides,
        0 if rotations is None else rotations.stride(0),
    )  # fmt: skip
    return (out[0], lse[0]) if splits == 1 else launch_merge(out, lse, query.dtype)


def _fake(query_latent, query_pe, rows, scales, slots, num_keys, rotations, scale, splits, eight=None):
    batch, queries, heads, rank = query_latent.shape
    out = query_latent.new_empty(batch, queries, heads, rank)
    return out, query_latent.new_empty(batch, heads, queries, dtype=torch.float32)


define(
    "latent_attention",
    "(Tensor query_latent, Tensor? query_pe, Tensor rows, Tensor? scales, Tensor slots, Tensor? num_keys, "
    "Tensor? rotations, float scale, int splits, int? eight=None) -> (Tensor, Tensor)",
    _launch,
    latent_attention_reference,
    _fake,
)
