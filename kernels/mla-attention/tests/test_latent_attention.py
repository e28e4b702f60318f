"""Absorbed attention to rows of the ring."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_case import (
    DEVICE,
    DTYPES,
    EPSILON,
    FAMILIES,
    Ring,
    error,
    int32,
    module,
    randn,
    ring,
    take_tiles_of,
    unit_rotations,
    with_tables,
)
from mla_attention import latent_attention, latent_attention_reference, merge, why_not_latent_attention
from mla_attention._ops import ops

SCALE = 0.1


@pytest.fixture(params=["gathered", *(f"packed, {family}" for family in FAMILIES)])
def way(request, monkeypatch):
    """Gathered rows, and packed rows with the tiles of every family."""
    packs = request.param != "gathered"
    monkeypatch.setattr(module("latent_tiles"), "PACKED_FROM", 1 if packs else 2**31)
    if packs:
        take_tiles_of(FAMILIES[request.param_index - 1], "latent_attention", monkeypatch)


every_way = pytest.mark.usefixtures("way")


def case(
    rank=64, shared=8, heads=3, queries=5, dtype=torch.float32, slots=(0, 3, 4, 1), tokens=7, scale=1.0, **of_ring
):
    """Arguments of `latent_attention` up to the scale, and the valid rows."""
    cached = ring(rank + shared, dtype, slots=slots, tokens=tokens, **of_ring)
    batch, keys = cached.rows.shape[0], len(slots) * tokens
    pe = randn(batch, queries, heads, shared, dtype=dtype, seed=2, scale=scale) if shared else None
    turn = unit_rotations(keys, shared // 2) if shared else None
    if shared:
        turn[len(cached.valid[0]) :] = float("nan")
    latent = randn(batch, queries, heads, rank, dtype=dtype, seed=1, scale=scale)
    return [latent, pe, cached.rows, cached.scales, cached.slots, cached.num_keys, turn], cached.valid


def dense(arguments, valid):
    """Queries, keys and values `[B, n, H, ...]` of equivalent plain attention, in float64."""
    latent, pe, *_, turn = arguments
    rank, heads = latent.shape[-1], latent.shape[2]
    query, key = latent.double(), valid[..., :rank]
    if pe is not None:
        query = torch.cat([query, pe.double()], dim=-1)
        pairs = torch.view_as_complex(valid[..., rank:].unflatten(-1, (-1, 2)).contiguous())
        turned = pairs * torch.view_as_complex(turn[: valid.shape[1]].double())
        key = torch.cat([key, torch.view_as_real(turned).flatten(-2)], dim=-1)
    return query, *(x.unsqueeze(2).expand(-1, -1, heads, -1) for x in (key, valid[..., :rank]))


def exact(arguments, valid, scale=SCALE):
    """Output and lse in float64, straight from the definition."""
    query, key, value = dense(arguments, valid)
    logits = scale * torch.einsum("bqhd,bkhd->bhqk", query, key)
    return torch.einsum("bhqk,bkhr->bqhr", logits.softmax(-1), value), logits.logsumexp(-1)


def sdpa_error(arguments, valid, expected, scale=SCALE):
    """Errors of torch's attention in the dtype of the queries, with exactly rotated keys."""
    query, key, value = (x.to(arguments[0].dtype).transpose(1, 2) for x in dense(arguments, valid))
    return error(F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2), expected)


def check(arguments, valid, scale=SCALE, splits=1, floor=1):
    """Check the errors of the output and of lse: at most 1.2 times torch's and `floor` roundings."""
    out, lse = latent_attention(*arguments, scale, splits)
    expected, expected_lse = exact(arguments, valid, scale)
    dtype = arguments[0].dtype
    # The ratio to the error of SDPA is 0.4 to 1.2; the floor is the rounding of the result.
    assert error(out, expected) <= max(1.2 * sdpa_error(arguments, valid, expected, scale), floor * EPSILON[dtype])
    # Keys are rounded to the dtype after rotation.
    assert error(lse, expected_lse) <= max(EPSILON[dtype], 1e-6)  # 7e-8 in float32, 3e-5 in float16
    assert out.dtype == dtype and lse.dtype == torch.float32


@every_way
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [16, 64, 80, 96, 128, 192, 256, 512])
def test_error_is_that_of_sdpa(rank, dtype):
    check(*case(rank, shared=32, dtype=dtype, batch=1))


@every_way
@pytest.mark.parametrize(("heads", "queries", "shared"), [(1, 1, 0), (1, 40, 12), (3, 1, 44), (5, 9, 2), (12, 11, 32)])
def test_heads_queries_and_shared_channels(heads, queries, shared):
    """Tiles of (query, head) that end within a query, and fewer queries than a tile holds."""
    check(*case(96, shared, heads, queries, torch.float16))


@every_way
@pytest.mark.parametrize(
    ("tokens", "tail", "splits"),
    [(7, 3, 1), (7, 3, 5), (16, 0, 1), (16, 0, 2), (33, 1, 1), (33, 1, 2), (33, 70, 5), (1, 0, 1), (1, 0, 5)],
)
def test_rings_and_tails(tokens, tail, splits):
    """Frames shorter and longer than a block of keys; everything past the valid keys is NaN."""
    check(*case(64, tokens=tokens, tail=tail), splits=splits)


@every_way
@pytest.mark.parametrize("slots", [(2,), (0, 1, 2, 3, 4), (0, 4, 1, 2)])
def test_slots(slots):
    """A single frame, a ring that has not wrapped, and one that has wrapped past its sink."""
    check(*case(64, slots=slots))


@every_way
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "shared"), [(32, 0), (48, 16), (96, 44), (192, 32)])
def test_int8(rank, shared, dtype):
    """Quantization groups that are cut by a block of the rank or by the shared key."""
    arguments, valid = case(rank, shared, dtype=dtype, quantized=True)
    out, lse = latent_attention(*arguments, SCALE)
    expected, expected_lse = exact(arguments, valid)
    assert error(out, expected) < 2 * max(EPSILON[dtype], 2**-22)  # float16: 4e-4, float32: 2e-7
    assert error(lse, expected_lse) < max(EPSILON[dtype], 1e-6)


def tabled(arguments, valid, pooled):
    """The same arguments with a table of slots per item."""
    found = with_tables(Ring(*arguments[2:6], valid), pooled)
    return [*arguments[:2], *found[:4], arguments[6]]


@every_way
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 3])
def test_a_table_of_slots_for_each_item(splits, dtype, quantized, pooled):
    arguments, valid = case(dtype=dtype, quantized=quantized)
    out, lse = latent_attention(*tabled(arguments, valid, pooled), SCALE, splits)
    expected, expected_lse = exact(arguments, valid)
    assert error(out, expected) < 2 * max(EPSILON[dtype], 2**-22)  # float16: 3.6e-4, float32: 1.7e-7
    assert error(lse, expected_lse) < max(EPSILON[dtype], 1e-6)


@every_way
@pytest.mark.parametrize(("rank", "shared"), [(64, 32), (50, 12), (192, 0), (200, 32)])
@pytest.mark.parametrize("tail", [0, 3, 76])
def test_several_blocks_of_keys(tail, rank, shared, monkeypatch):
    """204, 201 and 128 keys with 16-bit tiles; memory that is allocated but not written is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(float("nan")))
    arguments, valid = case(rank, shared, dtype=torch.float16, tokens=51, tail=tail, quantized=rank == 200)
    for splits in (1, 2):
        check(arguments, valid, splits=splits, floor=1 + (rank == 200))


def test_the_tiles_that_share_a_multiprocessor():
    plan = module("latent_tiles").latent_plan(64, 32, 2**31, torch.bfloat16, False, False, 90)
    assert plan.options()["maxnreg"] * 32 * plan.num_warps * 2 == 65536


@every_way
@pytest.mark.skipif(DEVICE != "cpu", reason="the file is in the memory of the CPU")
@pytest.mark.parametrize("quantized", [False, True])
def test_a_ring_whose_offsets_take_64_bits(quantized, tmp_path):
    """2**31 scalars and more, in a sparse file in which only the used slots are written."""
    arguments, valid = case(dtype=torch.float16, quantized=quantized)
    pool = with_tables(Ring(*arguments[2:6], valid), True)
    (slots, tokens, width), step = pool.rows.shape[1:], 2**28
    file = torch.from_file(str(tmp_path / "rows"), shared=True, size=slots * step, dtype=pool.rows.dtype)
    far = file.as_strided((1, slots, tokens, width), (slots * step, step, width, 1))
    for table in pool.slots.long():
        far[0, table] = pool.rows[0, table]
    expected = latent_attention(*arguments[:2], *pool[:4], arguments[6], SCALE)
    found = latent_attention(*arguments[:2], far, *pool[1:4], arguments[6], SCALE)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@every_way
@pytest.mark.parametrize("splits", [1, 3])
def test_no_keys(splits):
    arguments, _ = case(64, tail=28)
    for out, lse in (latent_attention(*arguments, SCALE, splits), latent_attention_reference(*arguments, SCALE)):
        assert not out.any() and bool((lse == float("-inf")).all())


@every_way
@pytest.mark.parametrize("count", [1, 6, 28, 29, None])
def test_the_count_lies_on_the_device(count):
    """Every prefix length, more keys than exist, and all of them without a count."""
    arguments, valid = case(64, tail=0)
    arguments[5] = None if count is None else int32([count])
    check(arguments, valid[:, :count])


@every_way
@pytest.mark.parametrize("scale", [1e-6, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(dtype, scale):
    """From equal weights to one key that takes all the weight, with logits of a few thousand."""
    check(*case(64, dtype=dtype, scale=3.0), scale=scale)


@every_way
def test_parts_merge_to_the_whole():
    """History read in two calls and merged, as with a separate chunk."""
    arguments, valid = case(64, tail=0)
    latent, pe, rows, scales, slots, _, turn = arguments
    parts = [
        latent_attention(latent, pe, rows, scales, slots[a:b], int32([7 * (b - a)]), turn[7 * a : 7 * b], SCALE)
        for a, b in ((0, 1), (1, 4))
    ]
    out, lse = merge(torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts]))
    expected, expected_lse = exact(arguments, valid)
    assert error(out, expected) < 1e-6 and error(lse, expected_lse) < 1e-6  # 2e-7, 4e-8


@every_way
def test_views():
    """Queries that projections placed side by side, a part of a batch, and rows wider than what is read."""
    arguments, _ = case(64)
    latent, pe, rows, _, *others = arguments
    wide = torch.cat([latent, pe], dim=-1).transpose(1, 2).contiguous().transpose(1, 2)
    wider = F.pad(rows, (0, 24), value=float("nan")).repeat(2, 1, 1, 1)[2:]

    found = latent_attention(wide[..., :64], wide[..., 64:], wider, None, *others, SCALE)

    torch.testing.assert_close(found, latent_attention(*arguments, SCALE), rtol=0, atol=0)


@pytest.mark.parametrize("quantized", [False, True])
def test_reference_equals_the_definition(quantized):
    arguments, valid = case(96, 12, quantized=quantized, tail=3 * quantized)
    arguments[5] = arguments[5] if quantized else None
    expected = exact(arguments, valid)
    wide = [x.double() if x is not None and x.dtype == torch.float32 else x for x in arguments]
    for given in (wide, tabled(wide, valid, False), tabled(wide, valid, True)):
        torch.testing.assert_close(latent_attention_reference(*given, SCALE), expected, rtol=1e-12, atol=1e-12)


@every_way
@pytest.mark.parametrize("rank", [64, 192])
def test_opcheck(rank):
    arguments, _ = case(rank, heads=1, queries=2, slots=(0, 2), tokens=2, batch=1, quantized=rank == 192)
    torch.library.opcheck(ops.latent_attention.default, (*arguments, SCALE, 1))


@every_way
def test_opcheck_with_tables():
    arguments, valid = case(16, heads=1, queries=2, tokens=2, tail=0)
    arguments = tabled(arguments, valid, True)
    torch.library.opcheck(ops.latent_attention.default, (*arguments[:5], None, arguments[6], SCALE, 0))


def test_compiles_without_graph_breaks():
    arguments, _ = case(64)
    fused = torch.compile(latent_attention, fullgraph=True, dynamic=True, backend="eager")
    assert torch.equal(fused(*arguments, SCALE, 2)[0], latent_attention(*arguments, SCALE, 2)[0])


def test_refusals():
    (latent, pe, rows, _, slots, count, turn), _ = case(64)
    with pytest.raises(ValueError, match="rows are 72 wide, expected at least 80"):
        latent_attention(F.pad(latent, (0, 8)), pe, rows, None, slots, count, turn, SCALE)
    with pytest.raises(ValueError, match=r"rows is torch.float32, expected torch.int8"):
        latent_attention(latent, pe, rows, rows.half(), slots, count, turn, SCALE)
    with pytest.raises(ValueError, match=r"scales is \[2, 5, 7, 1\], expected \[2, 5, 7, 2\]"):
        latent_attention(latent, pe, rows.to(torch.int8), rows[..., :1].half(), slots, count, turn, SCALE)
    with pytest.raises(ValueError, match="rotations are missing"):
        latent_attention(latent, pe, rows, None, slots, count, None, SCALE)
    with pytest.raises(ValueError, match=r"rotations is \[27, 4, 2\], expected \[28, 4, 2\]"):
        latent_attention(latent, pe, rows, None, slots, count, turn[1:], SCALE)
    with pytest.raises(ValueError, match=r"slots is torch.int64, expected torch.int32"):
        latent_attention(latent, pe, rows, None, slots.long(), count, turn, SCALE)
    with pytest.raises(ValueError, match="65 splits; supported: 0 to 64"):
        latent_attention(latent, pe, rows, None, slots, count, turn, SCALE, 65)
    with pytest.raises(ValueError, match=r"scale 0.0 is not positive"):
        latent_attention(latent, pe, rows, None, slots, count, turn, 0.0)
    with pytest.raises(ValueError, match="rows hold 3 rings, expected 1 or 2"):
        latent_attention(latent, pe, rows[:1].repeat(3, 1, 1, 1), None, slots, count, turn, SCALE)
    with pytest.raises(ValueError, match=r"slots is \[1, 4\], expected \[2, \*\]"):
        latent_attention(latent, pe, rows, None, slots.unsqueeze(0), count, turn, SCALE)
    with pytest.raises(NotImplementedError, match="float64 is not supported"):
        latent_attention(latent.double(), pe.double(), rows.double(), None, slots, count, turn, SCALE)
    assert why_not_latent_attention(520, 32) == "latent_attention: kv_lora_rank 520; supported: 1 to 512"
    assert why_not_latent_attention(192, 7) == "latent_attention: 7 shared rotary channels; use an even number"
    assert why_not_latent_attention(192, 66) == "latent_attention: 66 shared rotary channels; supported: 0 to 64"
    assert why_not_latent_attention(192, 32, torch.bfloat16) is None


DESCRIBED = [(64, 0), (64, 32), (48, 32), (128, 32)]


@pytest.mark.parametrize(("rank", "shared"), DESCRIBED)
@pytest.mark.parametrize(("tail", "splits"), [(3, 1), (0, 2), (20, 1)])
def test_described_tiles(rank, shared, tail, splits, monkeypatch):
    """Packed rows loaded by descriptors, with a full and with a partial last block of keys."""
    monkeypatch.setattr(module("latent_tiles"), "PACKED_FROM", 1)
    if DEVICE == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no tensor memory accelerator")
    take_tiles_of(90 if DEVICE == "cpu" else None, "latent_attention", monkeypatch)
    tiles = module("latent_tiles").Tiles(128, 64, 64, True, 4, 2, 0, True)
    for family in (90, 100):
        monkeypatch.setitem(module("latent_tiles").TILES, family, [(512, tiles)])
    made = []
    describe = module("descriptors").describe
    monkeypatch.setattr(module("latent_attention"), "describe", lambda *given: made.append(given) or describe(*given))
    cached = ring(rank + shared, torch.float16, tokens=32, tail=tail)
    keys = 4 * 32
    latent = randn(2, 12, 12, rank, dtype=torch.float16, seed=1)
    pe = randn(2, 12, 12, shared, dtype=torch.float16, seed=2) if shared else None
    turn = unit_rotations(keys, shared // 2) if shared else None
    given = (cached.rows, None, cached.slots, cached.num_keys, turn, 0.1)

    out, lse = latent_attention(latent, pe, *given, splits)

    wide = (latent.double(), None if pe is None else pe.double(), cached.rows.double(), *given[1:])
    expected, expected_lse = latent_attention_reference(*wide)
    plain, _ = latent_attention_reference(latent, pe, *given)
    assert len(made) == (4 if shared else 2)
    assert error(out, expected) <= max(1.2 * error(plain, expected), EPSILON[torch.float16])
    assert error(lse, expected_lse) < 1e-4
