"""NaN and infinities are found wherever they are, in every dtype that clips and videos have."""

from __future__ import annotations

import math

import pytest
import torch

from mla_convert.finite import all_finite

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_numbers(dtype):
    extremes = torch.tensor([torch.finfo(dtype).min, 0, torch.finfo(dtype).tiny, torch.finfo(dtype).max], dtype=dtype)
    assert all_finite(extremes)
    assert all_finite(torch.ones((), dtype=dtype))
    assert all_finite(torch.zeros(2, 0, 3, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
# Vectorized reductions treat the last few numbers by themselves.
@pytest.mark.parametrize("place", [0, 5000, 10006])
def test_a_number_that_is_not_finite(dtype, bad, place):
    x = torch.randn(10007, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[place] = bad
    assert not all_finite(x)
    assert not all_finite(x.view(1, 10007, 1).expand(3, -1, 2).transpose(0, 1))


def test_one_number_does_not_hide_another():
    x = torch.zeros(100)
    x[3], x[50], x[70] = math.inf, math.nan, -math.inf
    assert not all_finite(x)
    assert not all_finite(torch.tensor(math.nan))
