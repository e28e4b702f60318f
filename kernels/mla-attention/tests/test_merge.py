"""Merging partial attention outputs."""

from __future__ import annotations

import pytest
import torch
from kernel_case import DTYPES, EPSILON, error, randn
from mla_attention import merge, merge_reference, why_not_merge
from mla_attention._ops import ops

INF = float("inf")


def parts(n=3, batch=2, queries=5, heads=3, channels=24, dtype=torch.float32, spread=3.0):
    outs = randn(n, batch, queries, heads, channels, dtype=dtype)
    return outs, randn(n, batch, heads, queries, seed=1, scale=spread)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "heads", "channels"), [(1, 1, 16), (2, 3, 24), (5, 5, 192)])
def test_equals_float64(dtype, n, heads, channels):
    outs, lses = parts(n=n, heads=heads, channels=channels, dtype=dtype)

    out, lse = merge(outs, lses)

    expected, expected_lse = merge_reference(outs.double(), lses)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert error(out, expected) < 2 * EPSILON[dtype]  # 1.4e-4 in float16, 7.8e-8 in float32
    assert error(lse, expected_lse) < 1e-6  # 8e-8


def test_equals_one_softmax():
    """Merging the softmaxes over disjoint keys gives the softmax over all keys."""
    logits, values = randn(2, 3, 5, 12, seed=2).double(), randn(2, 12, 3, 24, seed=3).double()
    outs, lses = [], []
    for keys in (slice(0, 4), slice(4, 12)):
        outs.append(torch.einsum("bhqk,bkhv->bqhv", logits[..., keys].softmax(-1), values[:, keys]))
        lses.append(logits[..., keys].logsumexp(-1))

    out, lse = merge(torch.stack(outs).float(), torch.stack(lses).float())

    assert error(out, torch.einsum("bhqk,bkhv->bqhv", logits.softmax(-1), values)) < 5e-7  # 7e-8
    assert error(lse, logits.logsumexp(-1)) < 5e-7  # 5e-8


@pytest.mark.parametrize("by_kernel", [True, False])
def test_empty_parts_do_not_matter(by_kernel):
    outs, lses = parts()
    expected, expected_lse = merge_reference(outs[::2], lses[::2])
    outs[1], lses[1] = float("nan"), -INF
    outs[:, 0, 2], lses[:, 0, :, 2] = float("nan"), -INF
    expected[0, 2], expected_lse[0, :, 2] = 0, -INF

    out, lse = (merge if by_kernel else merge_reference)(outs, lses)

    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shift", [-3e4, 3e4])
def test_extreme_logits(shift):
    outs, lses = parts()
    expected, _ = merge_reference(outs.double(), lses)

    out, lse = merge(outs, lses + shift)

    assert error(out, expected) < 5e-3  # 1e-3: the steps of float32 at 3e4 are 2e-3 wide
    assert error(lse - shift, merge_reference(outs, lses)[1]) < 2e-3  # 3e-4


def test_views_in_the_leading_axes():
    outs, lses = parts(n=4, queries=10, heads=6)
    outs, lses = outs[::2, :, :, ::3], lses[::2, :, ::3]

    out, lse = merge(outs, lses)

    expected, expected_lse = merge(outs.contiguous(), lses.contiguous())
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


def test_opcheck():
    outs, lses = parts()
    torch.library.opcheck(ops.merge.default, (outs, lses))
    fused = torch.compile(merge, fullgraph=True, dynamic=True, backend="eager")
    assert torch.equal(fused(outs, lses)[0], merge(outs, lses)[0])


def test_refusals():
    outs, lses = parts()
    with pytest.raises(ValueError, match=r"lses is \[2, 2, 3, 5\], expected \[3, 2, 3, 5\]"):
        merge(outs, lses[:2])
    with pytest.raises(ValueError, match="at least one part"):
        merge(outs[:0], lses[:0])
    with pytest.raises(ValueError, match=r"lses is torch.float64, expected torch.float32"):
        merge(outs, lses.double())
    with pytest.raises(NotImplementedError, match="float64 is not supported"):
        merge(outs.double(), lses)
    assert why_not_merge(2048) == "merge: 2048 value channels; supported: 1 to 1024"
    assert why_not_merge(128, torch.bfloat16) is None
