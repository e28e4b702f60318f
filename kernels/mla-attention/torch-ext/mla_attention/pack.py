"""Copy cached rows to reading order, dequantized and with rotated shared keys, without any matrix product.

`expand_kv.py` uses it to repeat shared keys over the heads. For many queries, `latent_attention.py` packs whole rows
with it, so that the query tiles need not repeat the same work on every row. Shape letters: B batch, T tokens per frame,
F frames read, K = F T keys, H heads, C channels, r `kv_lora_rank`, R shared rotary channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._runtime import Plan, ceil_div, jit, launch, power_of_two, tl
from .common import nibbles, rotate_pairs, valid_keys
from .quantize import Part, row_parts
from .ring import ring_strides, row_align


@jit(do_not_specialize=["keys", "slots_b"])
def _copy_kernel(
    out, rows, scales, slots, num_keys, rotations, tokens, keys, copies,
    out_b, out_k, out_h, rows_b, rows_s, rows_t, scales_b, scales_s, scales_t, slots_b, rotations_k,
    FIRST: tl.constexpr, CHANNELS: tl.constexpr, PHASE: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Copy CHANNELS channels of a `Part`, zero-padded to PADDED, of BLOCK_M rows to `copies` heads.

    Rows begin at multiples of ALIGN.
    """
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    b = tl.program_id(2).to(tl.int64)
    valid = valid_keys(num_keys, keys)
    # Without the number, the grid ends with the valid keys. Triton needs two ifs.
    if num_keys is not None:  # noqa: SIM102
        if tl.program_id(1) * BLOCK_M >= valid:
            return
    live = n < valid
    mask = live[:, None] & (c < CHANNELS)[None, :]
    slot = tl.load(slots + b * slots_b + n // tokens, mask=live, other=0).to(tl.int64)
    source = rows + tl.multiple_of(b * rows_b + slot * rows_s + n % tokens * rows_t, ALIGN)
    if GROUP == 32:
        two = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        x = tl.load(
            source[:, None] + (FIRST + two)[None, :], mask=live[:, None] & (two < CHANNELS // 2)[None, :], other=0
        )
        x = nibbles(x, BLOCK_M, BLOCK_N).to(tl.float32)
    else:
        x = tl.load(source[:, None] + (FIRST + c)[None, :], mask=mask, other=0).to(tl.float32)
    if scales is not None:
        steps = scales + b * scales_b + slot * scales_s + n % tokens * scales_t
        x *= tl.load(steps[:, None] + ((PHASE + c) // GROUP)[None, :], mask=mask, other=0.0).to(tl.float32)
    if rotations is not None:
        turn = tl.load(rotations + n.to(tl.int64)[:, None] * rotations_k + c[None, :], mask=mask, other=0.0)
        x = rotate_pairs(x, turn, BLOCK_M, BLOCK_N)
    target = out + b * out_b + n.to(tl.int64)[:, None] * out_k + c[None, :]
    for _ in range(copies):
        tl.store(target, x.to(out.dtype.element_ty), mask=live[:, None] & (c < PADDED)[None, :])
        target += out_h


def copy_rows(
    out: Tensor, rows: Tensor, scales: Tensor | None, slots: Tensor, num_keys: Tensor | None,
    part: Part, rotations: Tensor | None,
) -> None:  # fmt: skip
    """Write a part of the valid rows to every head of `out` `[B, K, H, C]` in reading order.

    The remaining channels of `out` are set to 0. Rows, scales, slots and `num_keys` are as in `expand_kv_`; rows from
    `num_keys` on are neither read nor written. `rotations`, float32 `[F T, part.count / 2, 2]`, rotate channel pairs in
    float32; the result is rounded once.
    """
    batch, capacity, heads, padded = out.shape
    tokens = rows.shape[2]
    keys = min(slots.shape[-1] * tokens, capacity)
    plan = copy_plan(part, padded, row_align(rows))
    tiles = ceil_div(padded, plan.constants["BLOCK_N"]), ceil_div(keys, plan.constants["BLOCK_M"])
    launch(
        _copy_kernel, (*tiles, batch), plan, out,
        out, rows, scales, slots, num_keys, rotations, tokens, keys, heads,
        *out.stride()[:3], *ring_strides(rows, scales, slots), 0 if rotations is None else rotations.stride(0),
    )  # fmt: skip


def packed_rows(
    rows: Tensor, scales: Tensor | None, slots: Tensor, num_keys: Tensor | None,
    rotations: Tensor | None, batch: int, rank: int, width: int, shared_width: int, dtype: torch.dtype,
    eight: int | None = None,
) -> Tensor:  # fmt: skip
    """The valid rows of a ring in reading order, `[B, K, width + shared_width]` in `dtype`.

    A packed row is the latent, zeros up to `width`, the shared key rotated by `rotations` `[K, R / 2, 2]`, and zeros.
    Without rotations, `shared_width` is 0. Rows from `num_keys` on are undefined. With `eight`, the rows of the ring
    are mixed, as `quantize_rows` returns them.
    """
    keys = slots.shape[-1] * rows.shape[2]
    packed = torch.empty(batch, keys, 1, width + shared_width, dtype=dtype, device=rows.device)
    source, shared = (rows, scales, slots, num_keys), 0 if rotations is None else 2 * rotations.shape[1]
    first, four, key = row_parts(rank, shared, eight)
    # The last part of the latent also writes the zeros behind it.
    if four.count:
        copy_rows(packed[..., first.count : width], *source, four, None)
        width = first.count
    if first.count:
        copy_rows(packed[..., :width], *source, first, None)
    if shared:
        copy_rows(packed[..., -shared_width:], *source, key, rotations)
    return packed.squeeze(2)


def copy_plan(part: Part, padded: int, align: int = 16) -> Plan:
    """Tiles of rows, which begin at multiples of `align` scalars, sized by the number of channels."""
    constants = {
        "FIRST": part.first,
        "CHANNELS": part.count,
        "PHASE": part.phase,
        "GROUP": part.group,
        "PADDED": padded,
        "BLOCK_M": 128,
        "BLOCK_N": min(64, max(2, power_of_two(padded))),
        "ALIGN": align,
    }
    return Plan(constants, 4, 1)
