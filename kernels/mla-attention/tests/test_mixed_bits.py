"""Rows with the first latents in 8 bits and the others in 4: written, expanded, packed and attended to."""

from __future__ import annotations

import pytest
import test_expand_kv as expand
import test_latent_attention as absorbed
import test_latent_write as write
import torch
from kernel_case import DEVICE, DTYPES, EPSILON, FAMILIES, error, int32, randn, take_tiles_of, unit_rotations
from mla_attention import (
    dequantize_rows,
    expand_kv_,
    expand_kv_reference,
    latent_attention,
    latent_attention_reference,
    latent_write_,
    latent_write_reference,
    quantize_rows,
)
from mla_attention._ops import ops
from mla_attention.pack import packed_rows
from mla_attention.quantize import row_scales, row_width

LAYOUTS = [
    # The 48x of the tables: one group of 8 bits, two of 4.
    (88, 0, 24),
    # No latent in 8 bits; all of them, which is not int8: the shared key has a scale of its own.
    (64, 8, 0), (40, 8, 40),
    # Odd numbers, parts that begin at odd bytes, groups that end early; several groups of each.
    (15, 2, 1), (121, 44, 41), (34, 12, 32), (230, 32, 96),
]  # fmt: skip
"""`kv_lora_rank`, shared channels, latents in 8 bits."""


def test_error_is_half_a_step_and_the_first_of_two_is_in_the_low_half():
    rows = randn(3, 5, 76) * torch.logspace(-3, 3, 5, device=DEVICE).view(-1, 1)
    values, scales = quantize_rows(rows, 20, 66)
    assert values.shape == (3, 5, 20 + 23 + 10) and scales.shape == (3, 5, 1 + 2 + 1)
    assert (row_width(66, 10, 20), row_scales(66, 10, 20)) == (53, 4)
    groups = torch.tensor([0] * 20 + [1] * 32 + [2] * 14 + [3] * 10, device=DEVICE)
    step = scales.float()[..., groups]
    found = dequantize_rows(values, scales, torch.float32, 20, 66)
    # Rounding the scale to float16 may clip the largest value of a group.
    assert bool(((found - rows).abs() <= 0.5001 * step + 2**-11 * rows.abs()).all())
    # Steps of 3 and -2 of the largest 7.
    one, _ = quantize_rows(torch.tensor([7.0, 0.0, 3.0, -2.0]), 0)
    assert one.tolist() == [7, 0xE3 - 256]
    assert torch.equal(dequantize_rows(*quantize_rows(rows, 76), torch.float32, 76, 76).isfinite(), rows.isfinite())
    with pytest.raises(ValueError, match=r"scales are \[3, 5, 3\] and do not fit"):
        dequantize_rows(values, scales[..., :3], torch.float32, 20, 66)


def selected(rank, shared, eight, values, **options):
    """Arguments of `latent_write_` whose rows are exactly `values` `[B, N, r + R]`."""
    arguments = write.case(rank, shared, 1, rank + shared + rank % 2, rank, eight=eight, baked=False, **options)
    _, _, _, key, value, gain, _, _, w_kv, b_kv, w_pe, b_pe = arguments[:12]
    for x in (gain, w_kv, b_kv, *(() if w_pe is None else (w_pe, b_pe))):
        x.zero_()
    value.copy_(values[..., :rank])
    w_kv[:, key.shape[-1] :] = torch.eye(rank)
    if shared:
        b_pe.copy_(values[0, 0, rank:])
    return arguments


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e8])
@pytest.mark.parametrize(("rank", "shared", "eight"), LAYOUTS)
def test_what_is_written_is_what_quantize_rows_returns(rank, shared, eight, scale):
    """To the bit, from zeros over scales that are 0 or subnormal in float16 to those that are clamped."""
    values = scale * randn(2, 14, rank + shared)
    values[0, 2], values[1, :, : rank // 2] = 0, 0
    values[..., rank:] = values[0, 0, rank:]
    arguments = selected(rank, shared, eight, values)
    latent_write_(*arguments, eight)
    steps, scales = quantize_rows(values.unflatten(1, (2, 7)), eight, rank)
    slots = arguments[2]
    assert torch.equal(arguments[1][:, slots], scales)
    assert torch.equal(arguments[0][:, slots], steps)
    write.written(arguments, eight, rank)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize(("rank", "shared", "eight"), LAYOUTS)
def test_writing(rank, shared, eight, mean, dtype):
    arguments = write.case(rank, shared, dtype=dtype, eight=eight, mean=mean)
    latent_write_(*arguments, eight)
    expected = write.by_torch(arguments, torch.float64)
    best = dequantize_rows(*quantize_rows(expected, eight, rank), torch.float64, eight, rank)
    # A value at a border may round to the other step.
    assert error(write.written(arguments, eight, rank), expected) < 1.05 * error(best, expected)


@pytest.mark.parametrize("by", [latent_write_, latent_write_reference])
@pytest.mark.parametrize("pooled", [False, True])
def test_writing_with_a_table_of_slots_for_each_item(pooled, by):
    arguments = write.tabled(write.case(89, 8, eight=25, tokens=33), pooled)
    expected = write.by_torch([*arguments[:2], int32([3, 0]), *arguments[3:]], torch.float64)
    by(*arguments, 25)
    rows, scales, slots = arguments[:3]
    index = (torch.zeros_like(slots) if pooled else torch.arange(2, device=DEVICE).unsqueeze(1), slots)
    found = dequantize_rows(rows[index], scales[index], torch.float64, 25, 89)
    best = dequantize_rows(*quantize_rows(expected, 25, 89), torch.float64, 25, 89)
    assert error(found, expected) < 1.05 * error(best, expected)
    scales[index], rows[index] = float("nan"), -128
    assert bool(scales.isnan().all()) and bool((rows == -128).all())


@pytest.fixture(params=FAMILIES)
def family(request, monkeypatch):
    """Narrow and wide tiles of the product."""
    take_tiles_of(request.param, "expand_kv", monkeypatch)


def expanded(layout, rank, shared, eight, pooled=None, **options):
    """Outputs of `expand_kv_` compared with float64; what is not valid stays NaN."""
    own = shared if layout == "cached" else 0
    arguments, valid = expand.case(layout, rank, shared=shared or 2, mixed=(eight, rank), **options)
    assert arguments[2].shape[-1] == row_width(rank, own if shared else 2 * (layout == "cached"), eight)
    if pooled is not None:
        arguments = expand.tabled(arguments, valid, pooled)
    expand_kv_(*arguments, eight)
    # Rows are rounded to the dtype before the product: 2.6e-4 in float16, 1.1e-7 in float32.
    dtype = options.get("dtype", torch.float32)
    expand.check(arguments, valid, (2 if dtype != torch.float32 else 8) * EPSILON[dtype])


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "shared", "eight"), LAYOUTS)
@pytest.mark.parametrize("layout", ["rotate_on_read", "cached", "derived"])
def test_expanding(layout, rank, shared, eight, dtype):
    expanded(layout, rank, shared, eight, dtype=dtype, batch=1)


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("layout", ["rotate_on_read", "cached", "derived"])
def test_expanding_with_a_table_of_slots_for_each_item(layout, pooled):
    expanded(layout, 89, 8, 25, pooled, dtype=torch.float16)


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize(("tokens", "tail"), [(97, 131), (1, 0), (128, 0), (33, 5)])
def test_expanding_several_tiles_of_keys(tokens, tail):
    """A tile with one valid key and one with none; whole tiles; one token."""
    expanded("cached", 121, 6, 41, tokens=tokens, tail=tail, heads=5, dtype=torch.float16)


@pytest.mark.parametrize("scale", [1e-4, 3e2])
def test_expanding_extreme_rows(scale):
    arguments, valid = expand.case("cached", 88, mixed=(24, 88), dtype=torch.float16, scale=scale)
    arguments[7].zero_()
    expand_kv_(*arguments, 24)
    expand.check(arguments, valid, 2 * EPSILON[torch.float16])  # 2.8e-4


@pytest.mark.parametrize("pooled", [False, True])
def test_reference_of_expand(pooled):
    arguments, valid = expand.case("cached", 89, mixed=(25, 89))
    wide = [x.double() if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x
            for x in expand.tabled(arguments, valid, pooled)]  # fmt: skip
    expand_kv_reference(*wide, 25)
    expand.check(wide, valid, 1e-12)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "shared", "eight"), LAYOUTS)
def test_absorbed_attention(rank, shared, eight, dtype, many, monkeypatch):
    """Few queries and many: both read packed rows. What is packed and not valid is NaN."""
    monkeypatch.setattr(absorbed.module("latent_tiles"), "PACKED_FROM", 1 if many else 2**31)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(float("nan")))
    arguments, valid = absorbed.case(rank, shared, dtype=dtype, tokens=33, tail=5, mixed=(eight, rank))
    expected, expected_lse = absorbed.exact(arguments, valid)
    for pooled in (None, True):
        found = arguments if pooled is None else absorbed.tabled(arguments, valid, pooled)
        for splits in (1, 3):
            out, lse = latent_attention(*found, absorbed.SCALE, splits, eight)
            assert error(out, expected) < 2 * max(EPSILON[dtype], 2**-22)  # float16: 4.2e-4, float32: 1.9e-7
            assert error(lse, expected_lse) < max(EPSILON[dtype], 1e-6)
        wide = [None if x is None else x.double() for x in found[:2]]
        exact, _ = latent_attention_reference(*wide, *found[2:], absorbed.SCALE, 1, eight)
        assert error(exact, expected) < 1e-12


@pytest.mark.parametrize(("rank", "shared", "eight"), LAYOUTS)
def test_packed_rows_have_zeros_behind_latents_and_keys(rank, shared, eight):
    cached = absorbed.ring(rank + shared, torch.float32, tokens=43, tail=40, mixed=(eight, rank))
    turn = None
    if shared:
        turn = unit_rotations(4 * 43, shared // 2)
        turn[..., 0], turn[..., 1] = 1, 0
    packed = packed_rows(*cached[:4], turn, 2, rank, rank + 3, 64 if shared else 0, torch.float32, eight)
    packed = packed[:, : cached.valid.shape[1]]
    assert torch.equal(packed[..., :rank].double(), cached.valid[..., :rank].float().double())
    assert torch.equal(packed[..., rank + 3 :][..., :shared].double(), cached.valid[..., rank:].float().double())
    assert not packed[..., rank : rank + 3].any() and not packed[..., rank + 3 + shared :].any()


@pytest.mark.parametrize("table", [False, True])
def test_opcheck(table):
    arguments = write.case(20, heads=1, batch=2, tokens=2, eight=6)
    checks = [(ops.latent_write_, [*(write.tabled(arguments, True) if table else arguments), 6])]
    arguments, valid = expand.case("cached", 20, heads=1, tokens=2, mixed=(6, 20))
    checks.append((ops.expand_kv_, [*(expand.tabled(arguments, valid, True) if table else arguments), 6]))
    arguments, valid = absorbed.case(20, tokens=2, tail=1, mixed=(6, 20))
    arguments[-1].nan_to_num_()
    found = absorbed.tabled(arguments, valid, True) if table else arguments
    checks.append((ops.latent_attention, [*found, absorbed.SCALE, 1, 6]))
    for op, given in checks:
        torch.library.opcheck(op.default, tuple(given))


def test_compiles_without_graph_breaks():
    arguments, _ = expand.case("derived", 20, mixed=(6, 20))
    expected = [x.clone() for x in arguments[:2]]
    expand_kv_(*expected, *arguments[2:], 6)
    torch.compile(expand_kv_, fullgraph=True, dynamic=True, backend="eager")(*arguments, 6)
    torch.testing.assert_close(arguments[:2], expected, equal_nan=True)
    first, second = write.case(20, eight=6), write.case(20, eight=6)
    torch.compile(latent_write_, fullgraph=True, dynamic=True, backend="eager")(*first, 6)
    latent_write_(*second, 6)
    assert torch.equal(first[0], second[0])


def test_refusals():
    arguments, _ = expand.case("cached", 20, mixed=(6, 20))
    with pytest.raises(ValueError, match="15 latents in 4 bits do not fill bytes; use an even number"):
        expand_kv_(*arguments, 5)
    with pytest.raises(ValueError, match="22 of 20 latents have 8 bits"):
        expand_kv_(*arguments, 22)
    with pytest.raises(ValueError, match="rows are 13 wide, expected at least 21"):
        expand_kv_(*arguments[:2], arguments[2][..., :13], arguments[3][..., :2], *arguments[4:], 6)
    floats, _ = expand.case("cached", 20)
    with pytest.raises(ValueError, match="rows in 8 and 4 bits need scales"):
        expand_kv_(*floats, 6)
    arguments = write.case(20, eight=6)
    with pytest.raises(ValueError, match=r"scales is .*, expected \[2, 5, 7, 3\]"):
        latent_write_(arguments[0], arguments[1][..., :2], *arguments[2:], 6)
    with pytest.raises(ValueError, match="rows are 20 wide, expected 21"):
        latent_write_(arguments[0][..., :20], arguments[1], *arguments[2:], 6)
    arguments, _ = absorbed.case(20, mixed=(6, 20))
    with pytest.raises(ValueError, match="rows are 20 wide, expected at least 21"):
        latent_attention(*arguments[:2], arguments[2][..., :20], *arguments[3:], absorbed.SCALE, 1, 6)
