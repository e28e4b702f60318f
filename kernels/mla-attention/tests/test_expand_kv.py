"""Expansion of cached rows to keys and values."""

from __future__ import annotations

import pytest
import torch
from kernel_case import (
    DEVICE,
    DTYPES,
    EPSILON,
    FAMILIES,
    Ring,
    error,
    int32,
    randn,
    ring,
    take_tiles_of,
    unit_rotations,
    with_tables,
)
from mla_attention import expand_kv_, expand_kv_reference, why_not_expand_kv
from mla_attention._ops import ops

LAYOUTS = ["rotate_on_read", "cached", "derived", "no shared key", "only a shared key"]


@pytest.fixture(params=FAMILIES)
def family(request, monkeypatch):
    """Narrow and wide tiles of the product."""
    take_tiles_of(request.param, "expand_kv", monkeypatch)


def case(layout, rank=64, heads=3, channels=24, values=16, shared=8, dtype=torch.float32, capacity=None, **of_ring):
    """Arguments of `expand_kv_` with outputs of NaN, and the valid rows."""
    nope = 0 if layout == "only a shared key" else channels
    shared = 0 if layout in ("rotate_on_read", "no shared key") else shared
    cached = ring(rank + (shared if layout != "derived" else 0), dtype, **of_ring)
    batch, _, tokens, _ = cached.rows.shape
    keys = len(cached.slots) * tokens
    capacity = keys if capacity is None else capacity
    key_out = torch.full((batch, capacity, heads, nope + shared), float("nan"), dtype=dtype, device=DEVICE)
    value_out = torch.full((batch, capacity, heads, values), float("nan"), dtype=dtype, device=DEVICE)
    rotates = layout == "rotate_on_read"
    pairs = (nope if rotates else shared) // 2
    weight = randn(heads * (nope + values), rank, dtype=dtype, seed=5, scale=rank**-0.5)
    derived = layout == "derived"
    arguments = [
        key_out, value_out, cached.rows, cached.scales, cached.slots, cached.num_keys,
        weight, randn(len(weight), dtype=dtype, seed=6),
        randn(shared, rank, dtype=dtype, seed=7, scale=rank**-0.5) if derived else None,
        randn(shared, dtype=dtype, seed=8) if derived else None,
        unit_rotations(keys, pairs) if pairs else None, rotates,
    ]  # fmt: skip
    return arguments, cached.valid


def expanded(arguments, valid):
    """Keys and values of the valid rows `[B, n, W]` in float64, straight from the definition."""
    key_out, value_out, _, _, _, _, weight, bias, w_pe, b_pe, rotations, rotates = arguments
    heads, values, rank = key_out.shape[2], value_out.shape[3], weight.shape[1]
    both = (valid[..., :rank] @ weight.double().T + bias.double()).unflatten(-1, (heads, -1))
    key, value = both[..., :-values], both[..., -values:]
    if rotations is None:
        return key, value
    turn = torch.view_as_complex(rotations[: valid.shape[1]].double()).unsqueeze(1)

    def rotated(x):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    if rotates:
        return rotated(key), value
    shared = valid[..., rank:] if w_pe is None else valid[..., :rank] @ w_pe.double().T + b_pe.double()
    return torch.cat([key, rotated(shared.unsqueeze(2)).expand(-1, -1, heads, -1)], dim=-1), value


def check(arguments, valid, limit):
    """The valid keys are right, the others are unchanged."""
    key, value = expanded(arguments, valid)
    count = valid.shape[1]
    for found, expected in ((arguments[0], key), (arguments[1], value)):
        assert error(found[:, :count], expected) < limit
        assert bool(found[:, count:].isnan().all())


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_float64(layout, dtype):
    arguments, valid = case(layout, dtype=dtype)
    expand_kv_(*arguments)
    # The error is that of one rounding: 1.4e-4 to 2.3e-4 in float16, 1e-7 to 2e-7 in float32.
    check(arguments, valid, (1 if dtype != torch.float32 else 8) * EPSILON[dtype])


def tabled(arguments, valid, pooled):
    """The same arguments with a table of slots per item."""
    found = with_tables(Ring(*arguments[2:6], valid), pooled)
    return [*arguments[:2], *found[:4], *arguments[6:]]


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["rotate_on_read", "cached", "derived"])
def test_a_table_of_slots_for_each_item(layout, dtype, quantized, pooled):
    arguments, valid = case(layout, dtype=dtype, quantized=quantized)
    arguments = tabled(arguments, valid, pooled)
    expand_kv_(*arguments)
    # 2.1e-4 in float16, 2.7e-4 from int8; 1.1e-7 in float32.
    check(arguments, valid, (1 + quantized if dtype != torch.float32 else 8) * EPSILON[dtype])


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_reference_with_tables(quantized, pooled):
    arguments, valid = case("cached", quantized=quantized)
    wide = [x.double() if x is not None and not isinstance(x, bool) and x.dtype == torch.float32 else x
            for x in tabled(arguments, valid, pooled)]  # fmt: skip
    expand_kv_reference(*wide)
    check(wide, valid, 1e-12)


def test_items_that_share_a_ring_and_a_table():
    arguments, valid = case("cached", batch=1)
    arguments[:2] = [x.repeat(3, 1, 1, 1) for x in arguments[:2]]
    expand_kv_(*arguments)
    check(arguments, valid.expand(3, -1, -1), 1e-6)


@pytest.mark.parametrize("rank", [64, 192])
def test_opcheck(rank):
    arguments, _ = case("cached", rank=rank, heads=1, batch=1, tokens=2, slots=(0, 2), tail=1, quantized=rank == 192)
    torch.library.opcheck(ops.expand_kv_.default, tuple(arguments))


def test_opcheck_with_tables():
    arguments, valid = case("cached", heads=1, tokens=2, tail=0)
    arguments = tabled(arguments, valid, True)
    torch.library.opcheck(ops.expand_kv_.default, (*arguments[:5], None, *arguments[6:]))


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize(
    ("rank", "quantized"),
    [
        (16, False), (64, True), (96, True), (128, False), (192, True), (200, False), (256, False), (448, True),
        (640, False), (1120, True), (2048, False),
    ],
)  # fmt: skip
def test_ranks(rank, quantized):
    arguments, valid = case("cached", rank=rank, heads=5, batch=1, dtype=torch.float16, quantized=quantized)
    expand_kv_(*arguments)
    # int8 rows are rounded to float16 before the product: 3.4e-4, without 2.1e-4.
    check(arguments, valid, (2 if quantized else 1) * EPSILON[torch.float16])


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_int8(layout):
    arguments, valid = case(layout, rank=96, batch=1, quantized=True)
    expand_kv_(*arguments)
    check(arguments, valid, 1e-6)  # 2e-7


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize(("heads", "channels", "values"), [(1, 128, 128), (5, 30, 24), (2, 160, 144), (9, 64, 96)])
def test_heads_and_channels(heads, channels, values):
    arguments, valid = case("rotate_on_read", heads=heads, channels=channels, values=values, dtype=torch.float16)
    expand_kv_(*arguments)
    check(arguments, valid, EPSILON[torch.float16])


@pytest.mark.parametrize("count", [0, 1, 27, 28, 99, None])
def test_only_valid_keys_are_written(count):
    arguments, valid = case("cached", tail=0)
    arguments[5] = None if count is None else int32([count])
    expected_key, expected_value = expanded(arguments, valid)
    count = 28 if count is None else count
    by_reference = [x.clone() for x in arguments[:2]]
    expand_kv_reference(*by_reference, *arguments[2:])

    expand_kv_(*arguments)

    for key, value in (arguments[:2], by_reference):
        torch.testing.assert_close(key[:, :count], expected_key[:, :count].float())
        torch.testing.assert_close(value[:, :count], expected_value[:, :count].float())
        assert bool(key[:, count:].isnan().all()) and bool(value[:, count:].isnan().all())


@pytest.mark.parametrize("capacity", [10, 40])
def test_workspaces_of_another_length(capacity):
    arguments, valid = case("cached", capacity=capacity)
    expand_kv_(*arguments)
    check(arguments, valid[:, :capacity], 1e-6)


def test_writes_into_a_part_of_a_workspace():
    """A part of longer buffers whose rows hold further channels: the rest of the buffers is unchanged."""
    arguments, valid = case("cached")
    key, value = torch.full((2, 50, 3, 48), 7.0), torch.full((2, 50, 3, 16), 7.0)
    arguments[0], arguments[1] = key.to(DEVICE)[:, 5:33, :, :32], value.to(DEVICE)[:, 5:33]
    whole_key, whole_value = arguments[0]._base, arguments[1]._base
    expand_kv_(*arguments)
    expected_key, expected_value = expanded(arguments, valid)
    assert error(whole_key[:, 5:30, :, :32], expected_key) < 1e-6 and error(whole_value[:, 5:30], expected_value) < 1e-6
    whole_key[:, 5:30, :, :32] = 7
    whole_value[:, 5:30] = 7
    assert bool((whole_key == 7).all()) and bool((whole_value == 7).all())


@pytest.mark.parametrize("slots", [(0, 2, 3, 4), (1,), (4, 0, 1)])
def test_any_order_of_slots(slots):
    arguments, valid = case("rotate_on_read", slots=slots, tokens=5, batch=3, tail=0)
    expand_kv_(*arguments)
    check(arguments, valid, 1e-6)


@pytest.mark.parametrize("scale", [1e-4, 3e2])
def test_extreme_rows(scale):
    arguments, valid = case("cached", dtype=torch.float16, scale=scale)
    arguments[7].zero_()
    expand_kv_(*arguments)
    check(arguments, valid, EPSILON[torch.float16])  # 2.1e-4, and 2.3e-4 for the small ones, subnormal in float16


def test_compiles_whole():
    arguments, _ = case("derived")
    expected = [x.clone() for x in arguments[:2]]
    expand_kv_(*expected, *arguments[2:])
    torch.compile(expand_kv_, fullgraph=True, dynamic=True, backend="eager")(*arguments)
    torch.testing.assert_close(arguments[:2], expected, equal_nan=True)


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("layout", ["rotate_on_read", "cached", "derived"])
def test_several_tiles_of_keys(layout, quantized):
    """A tile with one valid key, and one with none."""
    arguments, valid = case(layout, dtype=torch.float16, tokens=97, tail=131, heads=2, quantized=quantized)
    expand_kv_(*arguments)
    check(arguments, valid, (1 + quantized) * EPSILON[torch.float16])


def refused(arguments, **changes):
    names = (
        "key_out", "value_out", "rows", "scales", "slots", "num_keys", "w_kvb", "b_kvb", "w_pe", "b_pe", "rotations",
        "rotate_heads",
    )  # fmt: skip
    expand_kv_(**{**dict(zip(names, arguments)), **changes})  # noqa: B905


def test_refusals():
    arguments, _ = case("cached")
    key_out, value_out, rows, _, slots = arguments[:5]
    with pytest.raises(ValueError, match=r"w_kvb has 120 rows and does not fit 3 heads of 32 key and 4 value channels"):
        refused(arguments, value_out=value_out[..., :4])
    with pytest.raises(ValueError, match=r"rows are 64 wide, expected at least 72"):
        refused(arguments, rows=rows[..., :64])
    with pytest.raises(ValueError, match="rotations are missing"):
        refused(arguments, rotations=None)
    with pytest.raises(ValueError, match=r"rotations is \[28, 4, 2\], expected \[21, 4, 2\]"):
        refused(arguments, slots=slots[:3])
    with pytest.raises(ValueError, match=r"slots is torch.int64, expected torch.int32"):
        refused(arguments, slots=slots.long())
    with pytest.raises(ValueError, match=r"rows is torch.float16, expected torch.float32"):
        refused(arguments, rows=rows.half())
    with pytest.raises(ValueError, match=r"key_out is torch.float16, expected torch.float32"):
        refused(arguments, key_out=key_out.half())
    with pytest.raises(ValueError, match="rows hold 2 rings, expected 1 or 3"):
        refused(arguments, key_out=key_out[:1].repeat(3, 1, 1, 1), value_out=value_out[:1].repeat(3, 1, 1, 1))
    with pytest.raises(ValueError, match=r"slots is \[3, 4\], expected \[2, \*\]"):
        refused(arguments, slots=slots.repeat(3, 1))
    assert why_not_expand_kv(2049, 96, 32, 128) == "expand_kv: kv_lora_rank 2049; supported: 1 to 2048"
    assert why_not_expand_kv(192, 96, 31, 128) == "expand_kv: 31 shared rotary channels; use an even number"
    assert why_not_expand_kv(192, 96, 32, 512) == "expand_kv: 512 value channels; supported: 1 to 256"
    assert "float64 is not supported" in why_not_expand_kv(192, 96, 32, 128, torch.float64)
    assert why_not_expand_kv(192, 0, 32, 128, torch.bfloat16) is None
