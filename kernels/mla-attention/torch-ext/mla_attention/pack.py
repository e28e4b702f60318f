"""Copy cached rows to reading order, dequantized and with rotated shared keys, without any matrix product.

`expand_kv.py` uses it to repeat shared keys over the heads. For many queries, `latent_attention.py` packs whole rows
with it, so that the query tiles need not repeat the same work on every row. Shape letters: B batch, T tokens per frame,
F frames read, K = F T keys, H heads, C channels, r `kv_lora_rank`, R shared rotary channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._runtime import Plan, Variant, ceil_div, jit, launch, power_of_two, tl
from .ring import ring_strides


@jit(do_not_specialize=["keys", "slots_b"])
def _copy_kernel(
    out, rows, scales, slots, num_keys, rotations, tokens, keys, copies,
    out_b, out_k, out_h, rows_b, rows_s, rows_t, scales_b, scales_s, scales_t, slots_b, rotations_k,
    FIRST: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Copy CHANNELS channels from FIRST on, zero-padded to PADDED, of BLOCK_N rows to `copies` heads."""
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    b = tl.program_id(2).to(tl.int64)
    valid = tl.minimum(tl.load(num_keys), keys)
    if tl.program_id(1) * BLOCK_M >= valid:
        return
    live = n < valid
    mask = live[:, None] & (c < CHANNELS)[None, :]
    slot = tl.load(slots + b * slots_b + n // tokens, mask=live, other=0).to(tl.int64)
    source = rows + b * rows_b + slot * rows_s + n % tokens * rows_t
    x = tl.load(source[:, None] + (FIRST + c)[None, :], mask=mask, other=0).to(tl.float32)
    if scales is not None:
        steps = scales + b * scales_b + slot * scales_s + n % tokens * scales_t
        x *= tl.load(steps[:, None] + ((FIRST + c) // 64)[None, :], mask=mask, other=0.0).to(tl.float32)
    if rotations is not None:
        # cos and sin are interleaved like the pairs.
        turn = tl.load(rotations + n.to(tl.int64)[:, None] * rotations_k + c[None, :], mask=mask, other=0.0)
        cos, sin = tl.split(tl.reshape(turn, [BLOCK_M, BLOCK_N // 2, 2]))
        x, y = tl.split(tl.reshape(x, [BLOCK_M, BLOCK_N // 2, 2]))
        x = tl.reshape(tl.join(x * cos - y * sin, x * sin + y * cos), [BLOCK_M, BLOCK_N])
    target = out + b * out_b + n.to(tl.int64)[:, None] * out_k + c[None, :]
    for _ in range(copies):
        tl.store(target, x.to(out.dtype.element_ty), mask=live[:, None] & (c < PADDED)[None, :])
        target += out_h


def copy_rows(
    out: Tensor, rows: Tensor, scales: Tensor | None, slots: Tensor, num_keys: Tensor, first: int, channels: int,
    rotations: Tensor | None,
) -> None:  # fmt: skip
    """Write some channels of the valid rows, from `first` on, to every head of `out` `[B, K, H, C]` in reading order.

    The remaining channels of `out` are set to 0. Rows, scales, slots and `num_keys` are as in `expand_kv_`; rows from
    `num_keys` on are neither read nor written. `rotations`, float32 `[F T, channels / 2, 2]`, rotate channel pairs in
    float32; the result is rounded once.
    """
    batch, capacity, heads, padded = out.shape
    tokens = rows.shape[2]
    keys = min(slots.shape[-1] * tokens, capacity)
    plan = copy_plan(first, channels, padded)
    tiles = ceil_div(padded, plan.constants["BLOCK_N"]), ceil_div(keys, plan.constants["BLOCK_M"])
    launch(
        _copy_kernel, (*tiles, batch), plan, out,
        out, rows, scales, slots, num_keys, rotations, tokens, keys, heads,
        *out.stride()[:3], *ring_strides(rows, scales, slots), 0 if rotations is None else rotations.stride(0),
    )  # fmt: skip


def packed_rows(
    rows: Tensor, scales: Tensor | None, slots: Tensor, num_keys: Tensor, rotations: Tensor | None, batch: int,
    rank: int, width: int, shared_width: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The valid rows of a ring in reading order, `[B, K, width + shared_width]` in `dtype`.

    A packed row is the latent, zeros up to `width`, the shared key rotated by `rotations` `[K, R / 2, 2]`, and zeros.
    Without rotations, `shared_width` is 0. Rows from `num_keys` on are undefined.
    """
    keys = slots.shape[-1] * rows.shape[2]
    packed = torch.empty(batch, keys, 1, width + shared_width, dtype=dtype, device=rows.device)
    copy_rows(packed[..., :width], rows, scales, slots, num_keys, 0, rank, None)
    if rotations is not None:
        copy_rows(packed[..., width:], rows, scales, slots, num_keys, rank, 2 * rotations.shape[1], rotations)
    return packed.squeeze(2)


def copy_plan(first: int, channels: int, padded: int) -> Plan:
    """Tiles of rows, sized by the number of channels."""
    block_n = min(64, max(2, power_of_two(padded)))
    constants = {"FIRST": first, "CHANNELS": channels, "PADDED": padded, "BLOCK_M": 128, "BLOCK_N": block_n}
    return Plan(constants, 4, 1)


def aot_variants(capability: int) -> list[Variant]:
    """Ahead-of-time compilations: packed latents, and shared keys for one head or for all, also from int8."""
    found = []
    for channels, first, copies in ((192, 0, 1), (32, 192, 1), (32, 192, 12)):
        for quantised in (False, True):
            types = {"out": "*bf16", "rows": "*i8" if quantised else "*bf16", "slots": "*i32", "num_keys": "*i32"}
            optional = {"scales": ("*fp16", quantised), "rotations": ("*fp32", first > 0)}
            types |= {name: kind for name, (kind, there) in optional.items() if there}
            fixed = {name: None for name, (_, there) in optional.items() if not there}
            fixed |= {"copies": 1} if copies == 1 else {}
            plan = copy_plan(first, channels, channels)
            plan = plan._replace(constants={**plan.constants, **fixed})
            name = f"pack {channels} channels from {first}, {copies} heads" + ", int8" * quantised
            found.append(Variant(name, _copy_kernel, types, plan, dot=False))
    return found
