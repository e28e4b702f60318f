"""Merging two partial attention outputs without stacking them."""

from __future__ import annotations

import pytest
import torch
from kernel_case import DTYPES, EPSILON, error, randn
from mla_attention import merge, merge_pair, merge_pair_reference
from mla_attention._ops import ops

INF = float("inf")


def pair(batch=2, queries=5, heads=3, channels=24, dtype=torch.float32):
    outs = [randn(batch, queries, heads, channels, dtype=dtype, seed=seed) for seed in (0, 1)]
    lses = [randn(batch, heads, queries, seed=seed, scale=3.0) for seed in (2, 3)]
    return outs[0], lses[0], outs[1], lses[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "heads", "channels"), [(1, 1, 16), (5, 3, 24), (37, 5, 128)])
def test_equals_float64(dtype, queries, heads, channels):
    out_a, lse_a, out_b, lse_b = pair(queries=queries, heads=heads, channels=channels, dtype=dtype)

    out, lse = merge_pair(out_a, lse_a, out_b, lse_b)

    expected, expected_lse = merge_pair_reference(out_a.double(), lse_a, out_b.double(), lse_b)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert error(out, expected) < 2 * EPSILON[dtype]  # 1.7e-4 in float16, 4.8e-8 in float32
    assert error(lse, expected_lse) < 1e-6  # 5.2e-8


def test_equals_merge_to_the_bit():
    out_a, lse_a, out_b, lse_b = pair()
    stacked = merge(torch.stack([out_a, out_b]), torch.stack([lse_a, lse_b]))
    assert all(torch.equal(a, b) for a, b in zip(merge_pair(out_a, lse_a, out_b, lse_b), stacked, strict=True))


def test_empty_parts_do_not_matter():
    out_a, lse_a, out_b, lse_b = pair()
    expected, expected_lse = out_b.clone(), lse_b.clone()
    out_a[:], lse_a[:] = float("nan"), -INF
    out_b[0, 2], lse_b[0, :, 2] = float("nan"), -INF
    expected[0, 2], expected_lse[0, :, 2] = 0, -INF

    for found in (merge_pair(out_a, lse_a, out_b, lse_b), merge_pair(out_b, lse_b, out_a, lse_a)):
        torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(found[1], expected_lse, rtol=0, atol=1e-6)


def test_views_in_the_leading_axes():
    out_a, lse_a, out_b, lse_b = pair(queries=10, heads=6)
    views = out_a[::2, :, ::3], lse_a[::2, ::3], out_b[:1, :, 1::3], lse_b[:1, 1::3]

    found = merge_pair(*views)

    whole = merge_pair(*(x.contiguous() for x in views))
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))


def test_opcheck():
    inputs = pair()
    torch.library.opcheck(ops.merge_pair.default, inputs)
    fused = torch.compile(merge_pair, fullgraph=True, dynamic=True, backend="eager")
    assert torch.equal(fused(*inputs)[0], merge_pair(*inputs)[0])


def test_refusals():
    out_a, lse_a, out_b, lse_b = pair()
    with pytest.raises(ValueError, match=r"lse_b is \[2, 3, 4\], expected \[2, 3, 5\]"):
        merge_pair(out_a, lse_a, out_b, lse_b[..., :4])
    with pytest.raises(ValueError, match=r"out_b is torch.float64, expected torch.float32"):
        merge_pair(out_a, lse_a, out_b.double(), lse_b)
    with pytest.raises(NotImplementedError, match="float64 is not supported"):
        merge_pair(out_a.double(), lse_a, out_b.double(), lse_b)
