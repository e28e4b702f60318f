"""Writing the rows of new tokens to their slots."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_case import DEVICE, DTYPES, EPSILON, error, int32, randn, unit_rotations
from mla_attention import dequantize_rows, latent_write_, latent_write_reference, quantize_rows, why_not_latent_write
from mla_attention._ops import ops

EPS = 1e-6
WINDOW = 5


def case(
    rank=64, shared=8, heads=3, channels=24, values=16, dtype=torch.float32, batch=2, tokens=7, slots=(3, 0),
    baked=True, mean=False, quantized=False, scale=1.0, eight=None,
):  # fmt: skip
    """Arguments of `latent_write_` with a ring of NaN, int8: of -128 with scales of NaN."""
    length, keys = len(slots) * tokens, heads * channels
    ring = (batch, WINDOW, tokens)
    if quantized or eight is not None:
        steps, found = quantize_rows(torch.zeros(rank + shared), eight, rank)
        rows = torch.full((*ring, len(steps)), -128, dtype=torch.int8, device=DEVICE)
        scales = torch.full((*ring, len(found)), float("nan"), dtype=torch.float16, device=DEVICE)
    else:
        rows, scales = torch.full((*ring, rank + shared), float("nan"), dtype=dtype, device=DEVICE), None
    inner = keys + heads * values
    return [
        rows, scales, int32(slots),
        randn(batch, length, keys, dtype=dtype, seed=1, scale=scale),
        randn(batch, length, heads * values, dtype=dtype, seed=2),
        1 + randn(keys, dtype=dtype, seed=3, scale=0.1), EPS,
        randn(keys, dtype=dtype, seed=4) if mean else None,
        randn(rank, inner, dtype=dtype, seed=5, scale=inner**-0.5), randn(rank, dtype=dtype, seed=6),
        randn(shared, keys, dtype=dtype, seed=7, scale=keys**-0.5) if shared else None,
        randn(shared, dtype=dtype, seed=8) if shared else None,
        unit_rotations(length, channels // 2, seed=9) if baked else None, heads,
    ]  # fmt: skip


def by_torch(arguments, dtype):
    """The rows `[B, F, T, W]` in a dtype, straight from the definition."""
    _, _, slots, *others, heads = arguments
    others = [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in others]
    key, value, gain, eps, mean, w_kv, b_kv, w_pe, b_pe, grid = others
    k = F.rms_norm(key, key.shape[-1:], gain, eps)
    if mean is not None:
        k = k - mean
    placed = k
    if grid is not None:
        wide = torch.promote_types(dtype, torch.float32)
        pairs = torch.view_as_complex(k.to(wide).unflatten(-1, (heads, -1, 2)).contiguous())
        turned = pairs * torch.view_as_complex(arguments[-2].to(wide)).unsqueeze(1)
        placed = torch.view_as_real(turned).flatten(2).to(dtype)
    found = F.linear(torch.cat([placed, value], dim=-1), w_kv, b_kv)
    if w_pe is not None:
        found = torch.cat([found, F.linear(k, w_pe, b_pe)], dim=-1)
    return found.unflatten(1, (len(slots), -1))


def written(arguments, *eight_and_rank):
    """The rows of the written slots, in float64; all others must be unchanged."""
    rows, scales, slots = arguments[:3]
    others = torch.ones(WINDOW, dtype=torch.bool, device=rows.device).index_fill(0, slots.long(), False)
    if scales is None:
        assert bool(rows[:, others].isnan().all())
        return rows[:, slots].double()
    assert bool((rows[:, others] == -128).all()) and bool(scales[:, others].isnan().all())
    return dequantize_rows(rows[:, slots], scales[:, slots], torch.float64, *eight_and_rank)


def check(arguments):
    """At most 1.2 times the error of torch in the same dtype, and one rounding."""
    latent_write_(*arguments)
    expected, dtype = by_torch(arguments, torch.float64), arguments[3].dtype
    limit = 1.2 * error(by_torch(arguments, dtype), expected)
    # The ratio to the error of torch is 0.6 to 1.0.
    assert error(written(arguments), expected) <= max(limit, EPSILON[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("baked", [False, True])
@pytest.mark.parametrize("shared", [0, 8])
def test_error_is_that_of_torch(shared, baked, mean, dtype):
    check(case(shared=shared, baked=baked, mean=mean, dtype=dtype))


@pytest.mark.parametrize("rank", [16, 64, 96, 128, 192, 256, 512, 1120])
def test_ranks(rank):
    """Groups that hold only latents, only the shared key, or the end of one and the start of the other."""
    check(case(rank, shared=32, heads=1, dtype=torch.float16, batch=1))


@pytest.mark.parametrize(
    ("heads", "channels", "values", "shared"), [(1, 128, 128, 32), (5, 30, 24, 12), (3, 12, 7, 2), (2, 160, 144, 44)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_and_channels(heads, channels, values, shared, dtype):
    check(case(96, shared, heads, channels, values, dtype, batch=1))


def tabled(arguments, pooled):
    """The same arguments with a table of slots per item: in separate rings, or in lanes of a pool of three."""
    rows, scales = arguments[:2]
    tables = [[13, 10], [3, 1]] if pooled else [[3, 0], [3, 1]]
    if pooled:
        rows, scales = (None if x is None else x[:1].repeat(1, 3, 1, 1) for x in (rows, scales))
    return [rows, scales, int32(tables), *arguments[3:]]


@pytest.mark.parametrize("write", [latent_write_, latent_write_reference])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_table_of_slots_for_each_item(dtype, quantized, pooled, write):
    arguments = case(dtype=dtype)
    expected = by_torch(arguments, torch.float64)
    limit = max(1.2 * error(by_torch(arguments, dtype), expected), EPSILON[dtype], 8e-3 * quantized)
    arguments = tabled(case(dtype=dtype, quantized=quantized), pooled)
    write(*arguments)
    rows, scales, slots = arguments[:3]
    index = (torch.zeros_like(slots) if pooled else torch.arange(2, device=DEVICE).unsqueeze(1), slots)
    found = rows[index] if scales is None else dequantize_rows(rows[index], scales[index], torch.float64)
    assert error(found, expected) <= limit  # int8: 6e-3
    kept = rows if scales is None else scales
    kept[index] = float("nan")
    assert bool(kept.isnan().all())


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("slots", "tokens", "batch"), [((4,), 1, 1), ((2, 3, 0), 33, 1), ((4, 1), 16, 3)])
def test_slots(slots, tokens, batch, quantized):
    """A single token, frames longer than a tile, and a chunk that wraps around the end of the ring."""
    arguments = case(slots=slots, tokens=tokens, batch=batch, quantized=quantized)
    latent_write_(*arguments)
    found, expected = written(arguments), by_torch(arguments, torch.float64)
    assert error(found, expected) < (8e-3 if quantized else 1e-6)  # 6e-3: that of int8; 9e-8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "shared"), [(64, 0), (48, 8), (96, 32), (192, 32)])
def test_int8_as_quantize_rows(rank, shared, dtype):
    arguments = case(rank, shared, dtype=dtype, quantized=True)
    latent_write_(*arguments)
    expected = by_torch(arguments, torch.float64)
    steps, scales = quantize_rows(expected)
    found, found_scales = (x[:, arguments[2]] for x in arguments[:2])
    # Rounding keys to float16 occasionally moves a value to the next int8 step.
    assert int((found.int() - steps.int()).abs().max()) <= 1
    assert float((found != steps).double().mean()) < (0.05 if dtype != torch.float32 else 0.001)  # 0.009, 0
    torch.testing.assert_close(found_scales, scales, rtol=2e-3, atol=0)  # 1e-3: one unit of float16
    assert error(written(arguments), expected) < 1.05 * error(dequantize_rows(steps, scales, torch.float64), expected)


def test_int8_of_zeros_and_huge_values():
    """A group of zeros has scale 0; a scale too large for float16 is clamped."""
    arguments = case(64, 64, quantized=True)
    for weight in arguments[10:12]:
        weight.zero_()
    arguments[9] += 1e8
    latent_write_(*arguments)
    rows, scales = (x[:, arguments[2]] for x in arguments[:2])
    assert not scales[..., 1].any() and not rows[..., 64:].any()
    assert bool((scales[..., 0] == 65504).all()) and bool((rows[..., :64] == 127).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_extreme_keys(scale, dtype):
    """The norm cancels the scale of the keys; a key times a gain of 10 would overflow float16."""
    arguments = case(dtype=dtype, scale=scale)
    arguments[5] *= 10
    check(arguments)


def test_views():
    """Keys and values that one projection placed side by side, and a part of a ring and of its batch."""
    arguments = case()
    key, value = arguments[3:5]
    both = torch.cat([key, value], dim=-1)
    wide = torch.full((3, WINDOW, 7, 72), float("nan"), device=DEVICE)
    latent_write_(*arguments)

    latent_write_(wide[1:], None, arguments[2], both[..., :72], both[..., 72:], *arguments[5:])

    torch.testing.assert_close(wide[1:], arguments[0], rtol=0, atol=0, equal_nan=True)
    assert bool(wide[0].isnan().all())


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("mean", [False, True])
def test_reference_equals_the_definition(mean, quantized):
    arguments = case(96, 12, mean=mean, quantized=quantized)
    wide = [x.double() if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x for x in arguments]
    latent_write_reference(*wide)
    expected = by_torch(arguments, torch.float64)
    if quantized:
        expected = dequantize_rows(*quantize_rows(expected), torch.float64)
    torch.testing.assert_close(written(wide), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [64, 96, 192])
def test_opcheck(rank):
    arguments = case(rank, heads=1, batch=1, tokens=2, quantized=rank == 192, mean=rank == 96, baked=rank != 64)
    torch.library.opcheck(ops.latent_write_.default, tuple(arguments))


def test_opcheck_with_tables():
    arguments = tabled(case(16, heads=1, tokens=2), True)
    torch.library.opcheck(ops.latent_write_.default, tuple(arguments))


def test_compiles_without_graph_breaks():
    first, second = case(), case()
    torch.compile(latent_write_, fullgraph=True, dynamic=True, backend="eager")(*first)
    latent_write_(*second)
    assert torch.equal(written(first), written(second))


def test_refusals():
    def fails(kind, text, **changed):
        arguments = case()
        for index, change in changed.items():
            arguments[int(index[1:])] = change(arguments[int(index[1:])])
        with pytest.raises(kind, match=text):
            latent_write_(*arguments)

    fails(ValueError, r"key is \[2, 13, 72\], expected \[2, 14, \*\]", _3=lambda x: x[:, 1:])
    fails(ValueError, r"value is torch.float16, expected torch.float32", _4=lambda x: x.half())
    fails(ValueError, r"w_kv is \[64, 119\], expected \[\*, 120\]", _8=lambda x: x[:, 1:])
    fails(ValueError, "w_kv must be contiguous", _8=lambda x: F.pad(x, (0, 8))[:, :-8])
    fails(ValueError, "rows are 72 wide, expected 64", _10=lambda x: None)
    fails(ValueError, r"rows is torch.float32, expected torch.int8", _1=lambda x: torch.zeros(2, WINDOW, 7, 2).half())
    fails(ValueError, r"grid is \[13, 12, 2\], expected \[14, 12, 2\]", _12=lambda x: x[1:])
    fails(ValueError, r"slots is torch.int64, expected torch.int32", _2=lambda x: x.long())
    fails(ValueError, "72 key channels are not divisible by 5 heads", _13=lambda x: 5)
    fails(NotImplementedError, "9 key channels per head cannot be rotated; use an even number", _13=lambda x: 8)
    doubled = {f"_{i}": (lambda x: x.double()) for i in (0, 3, 4, 5, 8, 9, 10, 11)}
    fails(NotImplementedError, "float64 is not supported", **doubled)
    fails(ValueError, "items that share a ring cannot write to the same slots", _0=lambda x: x[:1])
    fails(ValueError, r"slots is \[3, 2\], expected \[2, \*\]", _2=lambda x: x.repeat(3, 1))
    assert why_not_latent_write(2049, 32, 128) == "latent_write: kv_lora_rank 2049; supported: 1 to 2048"
    assert why_not_latent_write(192, 130, 128) == "latent_write: 130 shared rotary channels; supported: 0 to 128"
    assert why_not_latent_write(192, 32, 128, torch.bfloat16) is None
