"""Attention over a valid prefix of a workspace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from candidates import CANDIDATES
from kernel_case import DEVICE, DTYPES, EPSILON, FAMILIES, error, int32, module, randn, take_tiles_of
from mla_attention import attend, attend_reference, attend_tiles, merge, why_not_attend
from mla_attention._ops import ops
from mla_attention.descriptors import describable, describe


def inputs(queries=21, keys=50, heads=3, channels=24, values=None, batch=2, dtype=torch.float32, scale=1.0):
    values = channels if values is None else values
    return (
        randn(batch, queries, heads, channels, dtype=dtype, seed=1, scale=scale),
        randn(batch, keys, heads, channels, dtype=dtype, seed=2, scale=scale),
        randn(batch, keys, heads, values, dtype=dtype, seed=3),
    )


def exact(query, key, value, num_keys, scale):
    """`attend` in float64."""
    return attend_reference(query.double(), key.double(), value.double(), num_keys, scale)


def sdpa(query, key, value, scale):
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), scale=scale)
    return out.transpose(1, 2)


GEOMETRIES = [(1, 16, 16), (3, 24, 24), (5, 64, 32), (3, 96, 96), (1, 160, 128), (2, 200, 128), (1, 128, 128)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "channels", "values"), GEOMETRIES)
def test_error_is_that_of_sdpa(heads, channels, values, dtype):
    query, key, value = inputs(heads=heads, channels=channels, values=values, keys=130, dtype=dtype)
    scale = channels**-0.5

    out, lse = attend(query, key, value, None, scale)

    expected, expected_lse = exact(query, key, value, None, scale)
    # The ratio to the error of SDPA is 0.6 to 1.1; the floor is the rounding of the result.
    assert error(out, expected) <= max(1.2 * error(sdpa(query, key, value, scale), expected), EPSILON[dtype])
    assert error(lse, expected_lse) < 1e-6  # 1e-7
    assert out.dtype == dtype and lse.dtype == torch.float32


@pytest.mark.parametrize(
    ("count", "splits"), [(0, 1), (0, 5), (1, 1), (1, 5), (63, 2), (64, 1), (64, 2), (100, 1), (100, 5), (130, 2)]
)
def test_only_the_valid_prefix_counts(count, splits):
    query, key, value = inputs(keys=130, dtype=torch.float16)
    expected, expected_lse = exact(query, key[:, :count], value[:, :count], None, 0.2)
    key[:, count:], value[:, count:] = float("nan"), float("nan")

    out, lse = attend(query, key, value, int32([count]), 0.2, splits)

    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-3)  # 5e-4
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-5)  # 9e-7
    if count == 0:
        assert not out.any() and bool((lse == float("-inf")).all())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("channels", "values"), [(128, 128), (160, 128), (24, 24)])
@pytest.mark.parametrize(("count", "splits"), [(300, 1), (256, 1), (257, 2)])
def test_several_blocks_of_keys_for_many_queries(count, splits, channels, values, family, monkeypatch):
    """The large tiles, with a full and with a partial last block of keys."""
    take_tiles_of(family, "attend", monkeypatch)
    query, key, value = inputs(queries=140, keys=300, heads=2, channels=channels, values=values, dtype=torch.float16)
    scale = channels**-0.5
    valid = key[:, :count].clone(), value[:, :count].clone()
    expected, expected_lse = exact(query, *valid, None, scale)
    key[:, count:], value[:, count:] = float("nan"), float("nan")

    out, lse = attend(query, key, value, int32([count]), scale, splits)

    limit = 1.2 * error(sdpa(query, *valid, scale), expected)
    assert error(out, expected) <= max(limit, EPSILON[torch.float16])
    assert error(lse, expected_lse) < 1e-6


def test_a_count_beyond_the_keys_means_all():
    query, key, value = inputs()
    beyond, all_keys = attend(query, key, value, int32([51]), 0.2), attend(query, key, value, None, 0.2)
    torch.testing.assert_close(beyond, all_keys, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_splits_are_as_exact(dtype):
    query, key, value = inputs(keys=300, channels=64, dtype=dtype)
    expected, _ = exact(query, key, value, None, 0.125)
    found, _ = attend(query, key, value, None, 0.125, 3)
    assert error(found, expected) <= max(1.2 * error(sdpa(query, key, value, 0.125), expected), EPSILON[dtype])


def test_parts_merge_to_the_whole():
    query, key, value = inputs(keys=90)
    parts = [attend(query, key[:, a:b], value[:, a:b], None, 0.2) for a, b in ((0, 20), (20, 20), (20, 90))]

    out, lse = merge(torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts]))

    expected, expected_lse = exact(query, key, value, None, 0.2)
    assert error(out, expected) < 1e-6 and error(lse, expected_lse) < 1e-6  # 2e-7, 8e-8


@pytest.mark.parametrize("scale", [1e-6, 30.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(dtype, scale):
    """From equal weights to one key that takes all the weight, with logits of a few thousand."""
    query, key, value = inputs(dtype=dtype, channels=64, scale=3.0)

    out, lse = attend(query, key, value, None, scale)

    expected, expected_lse = exact(query, key, value, None, scale)
    assert error(out, expected) <= max(1.2 * error(sdpa(query, key, value, scale), expected), EPSILON[dtype])
    assert error(lse, expected_lse) < 1e-6  # 2e-7


def test_views():
    """A part of a workspace, channels of a wider tensor, and heads that a projection placed side by side."""
    query, key, value = inputs(queries=8)
    wide_key, wide_value = randn(2, 80, 3, 40), randn(2, 80, 3, 40)
    wide_key[:, 10:60, :, :24], wide_value[:, 10:60, :, 8:32] = key, value
    query_view = query.transpose(1, 2).contiguous().transpose(1, 2)

    found = attend(query_view, wide_key[:, 10:60, :, :24], wide_value[:, 10:60, :, 8:32], None, 0.2)

    torch.testing.assert_close(found, attend(query, key, value, None, 0.2), rtol=0, atol=0)


def test_opcheck():
    query, key, value = inputs(queries=4, keys=8, batch=1)
    arguments = (query, key, value, int32([7]), 0.2, 2)
    torch.library.opcheck(ops.attend.default, arguments)
    fused = torch.compile(attend, fullgraph=True, dynamic=True, backend="eager")
    assert torch.equal(fused(*arguments)[0], attend(*arguments)[0])


def test_reference_needs_no_valid_tail():
    query, key, value = inputs()
    expected, _ = attend_reference(query, key[:, :30], value[:, :30], None, 0.2)
    key[:, 30:], value[:, 30:] = float("nan"), float("nan")
    torch.testing.assert_close(attend_reference(query, key, value, int32([30]), 0.2)[0], expected)


def test_refusals():
    query, key, value = inputs()
    with pytest.raises(ValueError, match=r"key is \[2, 50, 2, 24\], expected \[2, \*, 3, 24\]"):
        attend(query, key[:, :, :2], value, None, 0.2)
    with pytest.raises(ValueError, match=r"value is torch.float16, expected torch.float32"):
        attend(query, key, value.half(), None, 0.2)
    with pytest.raises(ValueError, match="the last axis of key must be contiguous"):
        attend(query, key.transpose(2, 3).contiguous().transpose(2, 3), value, None, 0.2)
    with pytest.raises(ValueError, match=r"num_keys is torch.int64, expected torch.int32"):
        attend(query, key, value, int32([1]).long(), 0.2)
    with pytest.raises(ValueError, match="-1 splits; supported: 0 to 64"):
        attend(query, key, value, None, 0.2, -1)
    with pytest.raises(ValueError, match=r"scale -0.2 is not positive"):
        attend(query, key, value, None, -0.2)
    with pytest.raises(NotImplementedError, match="float64 is not supported"):
        attend(query.double(), key.double(), value.double(), None, 0.2)
    assert why_not_attend(384, 128) == "attend: 384 key channels per head; supported: 1 to 256"
    assert why_not_attend(160, 192) == "attend: 192 value channels per head; supported: 1 to 128"
    assert why_not_attend(160, 128, torch.bfloat16) is None


DESCRIBED = [tiles for tiles in CANDIDATES[90]["attend"] if tiles.described]


@pytest.mark.parametrize("tiles", DESCRIBED, ids=str)
@pytest.mark.parametrize(("count", "splits"), [(300, 1), (256, 1), (257, 2), (20, 1)])
def test_described_tiles(tiles, count, splits, monkeypatch):
    """Descriptors of parts of wider workspaces: only full blocks of keys, a partial last block, only a partial one."""
    if DEVICE == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no tensor memory accelerator")
    take_tiles_of(90 if DEVICE == "cpu" else None, "attend", monkeypatch)
    for family in (90, 100):
        monkeypatch.setitem(attend_tiles.DESCRIBED, family, tiles)
    query, key, value = inputs(queries=140, keys=330, heads=2, channels=64, dtype=torch.float16)
    valid = key[:, :count].clone(), value[:, :count].clone()
    expected, expected_lse = exact(query, *valid, None, 0.125)
    key[:, count:], value[:, count:] = float("nan"), float("nan")
    described = []
    monkeypatch.setattr(module("attend"), "describe", lambda *given: described.append(given) or describe(*given))

    out, lse = attend(query, key[:, :300], value[:, :300], int32([count]), 0.125, splits)

    assert len(described) == 3
    assert error(out, expected) <= max(1.2 * error(sdpa(query, *valid, 0.125), expected), EPSILON[torch.float16])
    assert error(lse, expected_lse) < 1e-6


def test_what_cannot_be_described_goes_by_pointers():
    rows = randn(2, 80, 3, 40, dtype=torch.float16)
    assert describable(rows) and describable(rows[:, 10:60]) and describable(rows[:, 10:60, :, :24])
    # An address and a row stride that 16 bytes do not divide, an item stride that is no multiple of the row stride,
    # heads outside of their rows, no rows.
    assert not describable(rows.flatten()[1:1201].view(1, 10, 3, 40))
    assert not describable(randn(2, 7, 3, 3, dtype=torch.float16))
    assert not describable(rows.flatten().as_strided((2, 70, 3, 40), (8408, 120, 40, 1)))
    assert not describable(rows.transpose(1, 2).contiguous().transpose(1, 2))
    assert not describable(rows[:, :0])
