"""Attention of a chunk's queries to keys and values in a workspace of which only a prefix is valid.

Online softmax over blocks of keys (FlashAttention-2, arXiv 2307.08691), without a mask. The prefix length is a device
tensor. With few query tiles, the keys are split over more programs, whose parts are merged (Flash-Decoding). Shape
letters: B batch, Q queries, K keys, H heads, D key and V value channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._ops import ops
from ._runtime import (
    Plan,
    blocks,
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
from .attend_tiles import tiles
from .common import softmax_step, valid_keys
from .descriptors import describable, describe
from .merge import launch_merge
from .splits import programs, split_count

MAX_CHANNELS = 256
MAX_VALUE_CHANNELS = 128
MAX_SPLITS = 64


@jit
def _load(pointers, offsets, live, start, SIZE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Channels `[start, start + BLOCK)` of some tokens; zeros past SIZE and, if MASKED, where not `live`."""
    c = start + tl.arange(0, BLOCK)
    source = pointers + offsets[:, None] + c[None, :]
    if start + BLOCK > SIZE:
        if MASKED:
            return tl.load(source, mask=live[:, None] & (c < SIZE)[None, :], other=0.0)
        return tl.load(source, mask=(c < SIZE)[None, :], other=0.0)
    if MASKED:
        return tl.load(source, mask=live[:, None], other=0.0)
    return tl.load(source)


@jit
def _logits(
    query, source, live, DESCRIBED: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of a block of keys; any value where not `live`.

    `source` is a descriptor with the row and column of the block or, unless DESCRIBED, pointers and offsets.
    """
    if DESCRIBED:
        found = tl.dot(query[0], source[0].load([source[1], source[2]]).T, input_precision=PRECISION)
    else:
        k1 = _load(source[0], source[1], live, 0, D, D1, MASKED)
        found = tl.dot(query[0], k1.T, input_precision=PRECISION)
        if D2 > 0:
            k2 = _load(source[0], source[1], live, D1, D, D2, MASKED)
            found = tl.dot(query[1], k2.T, found, input_precision=PRECISION)
    return found


@jit
def _step(
    logits, state, scale_log2, source, live, DESCRIBED: tl.constexpr,
    V: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over a block of keys; the `source` of its values is like that of the keys.

    The state is two blocks of sums, and the total and maximum of `softmax_step`.
    """
    acc1, acc2, total, top = state
    weights, shrink, total, top = softmax_step(logits, total, top, scale_log2, live, MASKED)
    acc1 *= shrink[:, None]
    if V2 > 0:
        acc2 *= shrink[:, None]
    if DESCRIBED:
        v1 = source[0].load([source[1], source[2]])
        if MASKED:
            # These rows belong to other items or were never written, so they may be NaN.
            v1 = tl.where(live[:, None], v1, 0.0)
    else:
        v1 = _load(source[0], source[1], live, 0, V, V1, MASKED)
    weights = weights.to(v1.dtype)
    acc1 = tl.dot(weights, v1, acc1, input_precision=PRECISION)
    if V2 > 0:
        v2 = _load(source[0], source[1], live, V1, V, V2, MASKED)
        acc2 = tl.dot(weights, v2, acc2, input_precision=PRECISION)
    return acc1, acc2, total, top


@jit
def _block(
    query, state, scale_log2, keys, values, live, DESCRIBED: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state after a block of keys and their values."""
    logits = _logits(query, keys, live, DESCRIBED, D, D1, D2, MASKED, PRECISION)
    return _step(logits, state, scale_log2, values, live, DESCRIBED, V, V1, V2, MASKED, PRECISION)


@jit
def _queries(pointers, offsets, inside, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """The channels of some queries in one or two blocks; zeros where not `inside`."""
    q1 = _load(pointers, offsets, inside, 0, D, D1, True)
    q2 = q1
    if D2 > 0:
        q2 = _load(pointers, offsets, inside, D1, D, D2, True)
    return q1, q2


@jit(do_not_specialize=["queries", "keys"])
def _attend_kernel(
    query, key, value, query_tiles, key_tiles, value_tiles, num_keys, out, lse, scale, queries, keys, heads,
    query_b, query_q, query_h, key_b, KEY_K: tl.constexpr, key_h, value_b, VALUE_K: tl.constexpr, value_h,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries of a head by a split of the keys: `out` `[splits, B, Q, H, V]`, `lse` `[splits, B, H, Q]`.

    KEY_K and VALUE_K are the token strides of keys and values, heads times channels in a workspace. As constants they
    save the registers that blocks of 128 keys need; a model has one or two such pairs, whatever its lengths. If there
    are descriptors (`query_tiles`, `key_tiles`, `value_tiles`), they load full tiles, all channels of a head at once.
    With AHEAD, the logits of the next block are computed before the softmax of the current one.
    """
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    valid = valid_keys(num_keys, keys)
    share = tl.cdiv(tl.cdiv(valid, BLOCK_K), tl.num_programs(2)) * BLOCK_K
    first = tl.minimum(tl.program_id(2) * share, valid)
    last = tl.minimum(first + share, valid)
    whole = first + (last - first) // BLOCK_K * BLOCK_K

    q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    n = tl.arange(0, BLOCK_K)
    inside = q < queries
    if query_tiles is not None:
        # A partial tile reads queries of the next item, whose results are not stored.
        row = (b * (query_b // query_q)).to(tl.int32) + tl.program_id(0) * BLOCK_Q
        q1 = query_tiles.load([row, (h * query_h).to(tl.int32)])
        query_blocks = (q1, q1)
    else:
        query_blocks = _queries(query + b * query_b + h * query_h, q.to(tl.int64) * query_q, inside, D, D1, D2)
    acc1 = tl.zeros([BLOCK_Q, V1], tl.float32)
    acc2 = tl.zeros([BLOCK_Q, V2 if V2 > 0 else 1], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    scale_log2 = scale * 1.4426950408889634
    state = (acc1, acc2, total, top)
    if key_tiles is not None:
        key_row, key_column = (b * (key_b // KEY_K)).to(tl.int32), (h * key_h).to(tl.int32)
        value_row, value_column = (b * (value_b // VALUE_K)).to(tl.int32), (h * value_h).to(tl.int32)
        if AHEAD:
            # The last full block has no next block.
            if first < whole:
                logits = _logits(
                    query_blocks, (key_tiles, key_row + first, key_column), inside, True, D, D1, D2, False, PRECISION
                )  # fmt: skip
                for start in range(first, whole - BLOCK_K, BLOCK_K):
                    coming = _logits(
                        query_blocks, (key_tiles, key_row + start + BLOCK_K, key_column), inside, True,
                        D, D1, D2, False, PRECISION,
                    )  # fmt: skip
                    state = _step(
                        logits, state, scale_log2, (value_tiles, value_row + start, value_column), inside, True,
                        V, V1, V2, False, PRECISION,
                    )  # fmt: skip
                    logits = coming
                state = _step(
                    logits, state, scale_log2, (value_tiles, value_row + whole - BLOCK_K, value_column), inside, True,
                    V, V1, V2, False, PRECISION,
                )  # fmt: skip
        else:
            for start in range(first, whole, BLOCK_K):
                state = _block(
                    query_blocks, state, scale_log2, (key_tiles, key_row + start, key_column),
                    (value_tiles, value_row + start, value_column), inside, True,
                    D, D1, D2, V, V1, V2, False, PRECISION,
                )  # fmt: skip
        keys_from = (key_tiles, key_row + whole, key_column)
        values_from = (value_tiles, value_row + whole, value_column)
    else:
        keys_of_head = key + b * key_b + h * key_h + tl.cast(first, tl.int64) * KEY_K
        values_of_head = value + b * value_b + h * value_h + tl.cast(first, tl.int64) * VALUE_K
        for _ in range(first, whole, BLOCK_K):
            state = _block(
                query_blocks, state, scale_log2, (keys_of_head, n * KEY_K), (values_of_head, n * VALUE_K), inside,
                False, D, D1, D2, V, V1, V2, False, PRECISION,
            )  # fmt: skip
            keys_of_head += BLOCK_K * KEY_K
            values_of_head += BLOCK_K * VALUE_K
        keys_from = (keys_of_head, n * KEY_K)
        values_from = (values_of_head, n * VALUE_K)
    if whole < last:
        state = _block(
            query_blocks, state, scale_log2, keys_from, values_from, n < last - whole, key_tiles is not None,
            D, D1, D2, V, V1, V2, True, PRECISION,
        )  # fmt: skip
    acc1, acc2, total, top = state

    # Without keys, the sums and the output are 0.
    total_or_one = tl.where(total > 0, total, 1.0)
    found = tl.where(total > 0, (top + tl.log2(total_or_one)) * 0.6931471805599453, float("-inf"))
    item = tl.program_id(2).to(tl.int64) * (tl.num_programs(1) // heads) + b
    tl.store(lse + (item * heads + h) * queries + q, found, mask=inside)
    target = out + ((item * queries + q) * heads + h)[:, None] * V
    v = tl.arange(0, V1)
    mixed = (acc1 / total_or_one[:, None]).to(out.dtype.element_ty)
    tl.store(target + v[None, :], mixed, mask=inside[:, None] & (v < V)[None, :])
    if V2 > 0:
        v = V1 + tl.arange(0, V2)
        mixed = (acc2 / total_or_one[:, None]).to(out.dtype.element_ty)
        tl.store(target + v[None, :], mixed, mask=inside[:, None] & (v < V)[None, :])


def attend(
    query: Tensor, key: Tensor, value: Tensor, num_keys: Tensor | None, scale: float, splits: int = 0
) -> tuple[Tensor, Tensor]:
    """Attention `(out [B, Q, H, V], lse [B, H, Q])`: `out` in the dtype of `query`, `lse` natural and float32.

    `query` `[B, Q, H, D]`, `key` `[B, K, H, D]` and `value` `[B, K, H, V]` are float16, bfloat16 or float32, with
    contiguous channels and any other strides. `num_keys`, int32 `[1]` on the device, is the number of valid keys (None:
    all K); the rest may hold anything. Without valid keys the results are 0 and -inf. `scale` > 0 multiplies the
    logits; softmax and sums are float32. `splits` programs share the keys of a tile; 0 lets `split_count` choose.

    Raises ValueError for arguments that do not fit, NotImplementedError for what `why_not_attend` rejects.
    """
    _check(query, key, value, num_keys, scale, splits)
    return ops.attend(query, key, value, num_keys, scale, splits)


def attend_reference(
    query: Tensor, key: Tensor, value: Tensor, num_keys: Tensor | None, scale: float, splits: int = 0
) -> tuple[Tensor, Tensor]:
    """`attend` in plain torch, computed in float64 for float64 inputs, else in float32; lse has the computed dtype.

    It holds all logits in memory; `splits` does not change the result.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    valid = torch.arange(key.shape[1], device=key.device) < (key.shape[1] if num_keys is None else num_keys)
    # Invalid rows may be NaN, which a weight of 0 would not cancel.
    key, value = (x.to(wide).masked_fill(~valid.view(-1, 1, 1), 0) for x in (key, value))
    logits = scale * torch.einsum("bqhd,bkhd->bhqk", query.to(wide), key)
    logits = logits.masked_fill(~valid, float("-inf"))
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0).unsqueeze(-1))
    return torch.einsum("bhqk,bkhv->bqhv", weights, value).to(query.dtype).contiguous(), lse


def why_not_attend(channels: int, value_channels: int, dtype: torch.dtype | None = None) -> str | None:
    """Why `attend` does not support these key and value channels or this dtype, in one line; None if it does."""
    for name, count, limit in (("key", channels, MAX_CHANNELS), ("value", value_channels, MAX_VALUE_CHANNELS)):
        if not 1 <= count <= limit:
            return f"attend: {count} {name} channels per head; supported: 1 to {limit}"
    return why_not_dtype("attend", dtype)


def attend_plan(
    channels: int, value_channels: int, queries: int, dtype: torch.dtype, capability: int, describable: bool = True,
) -> Plan:  # fmt: skip
    """Tiles by channels, queries, dtype and compute capability; see `attend_tiles.py`.

    `describable` says that descriptors of queries, keys and values can be created.
    """
    d1, d2 = blocks(channels)
    v1, v2 = blocks(value_channels)
    chosen = tiles(channels, value_channels, queries, dtype, capability, describable)
    constants = {
        "D": channels,
        "D1": d1,
        "D2": d2,
        "V": value_channels,
        "V1": v1,
        "V2": v2,
        "BLOCK_Q": chosen.block_q,
        "BLOCK_K": chosen.block_k,
        "AHEAD": chosen.ahead,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }
    return Plan(constants, chosen.warps, chosen.stages, chosen.max_registers, chosen.described)


def _check(query: Tensor, key: Tensor, value: Tensor, num_keys: Tensor | None, scale: float, splits: int) -> None:
    check_tensor("query", query, (None,) * 4)
    batch, _, heads, channels = query.shape
    check_tensor("key", key, (batch, None, heads, channels), query.dtype, like=query)
    check_tensor("value", value, (batch, key.shape[1], heads, None), query.dtype, like=query)
    if num_keys is not None:
        check_tensor("num_keys", num_keys, (1,), torch.int32, like=query)
    require(0 <= splits <= MAX_SPLITS, "attend: {} splits; supported: 0 to {}", splits, MAX_SPLITS)
    require(scale > 0, "attend: scale {} is not positive", scale)
    refuse(why_not_attend(channels, value.shape[-1], query.dtype))


def _launch(
    query: Tensor, key: Tensor, value: Tensor, num_keys: Tensor | None, scale: float, splits: int
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, channels = query.shape
    keys, value_channels = value.shape[1], value.shape[3]
    device = query.device
    plan = attend_plan(
        channels, value_channels, queries, query.dtype, capability(device),
        all(describable(x) for x in (query, key, value)),
    )  # fmt: skip
    block_q, block_k = plan.constants["BLOCK_Q"], plan.constants["BLOCK_K"]
    if splits == 0:
        shared = query.element_size() * (block_q * channels + plan.num_stages * block_k * (channels + value_channels))
        at_once = programs(device, plan, shared)
        splits = split_count(ceil_div(queries, block_q) * batch * heads, ceil_div(keys, block_k), at_once)
    dtype = query.dtype if splits == 1 else torch.float32
    out = torch.empty(splits, batch, queries, heads, value_channels, dtype=dtype, device=device)
    lse = torch.empty(splits, batch, heads, queries, dtype=torch.float32, device=device)
    descriptors = (None, None, None)
    if plan.described:
        descriptors = describe(query, block_q), describe(key, block_k), describe(value, block_k)
    launch(
        _attend_kernel, (ceil_div(queries, block_q), batch * heads, splits), plan, query,
        query, key, value, *descriptors, num_keys, out, lse, scale, queries, keys, heads,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
    )  # fmt: skip
    return (out[0], lse[0]) if splits == 1 else launch_merge(out, lse, query.dtype)


def _fake(query, key, value, num_keys, scale, splits):
    batch, queries, heads, _ = query.shape
    out = query.new_empty(batch, queries, heads, value.shape[3])
    return out, query.new_empty(batch, heads, queries, dtype=torch.float32)


define(
    "attend",
    "(Tensor query, Tensor key, Tensor value, Tensor? num_keys, float scale, int splits) -> (Tensor, Tensor)",
    _launch,
    attend_reference,
    _fake,
)
