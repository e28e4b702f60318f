"""Queries with unrotated and rotated channels separated."""

from __future__ import annotations

import pytest
import torch
from kernel_case import DTYPES, EPSILON, error, randn
from mla_attention import split_query, split_query_reference
from mla_attention._ops import ops

EPS = 1e-6


def inputs(batch=2, tokens=5, heads=3, head_dim=24, turned=(0, 3, 11), dtype=torch.float32, coefficients=torch.float32):
    pairs = head_dim // 2
    angles = randn(tokens, pairs, seed=2).float()
    still = torch.tensor([p for p in range(pairs) if p not in turned])
    return (
        randn(batch, tokens, heads * head_dim, dtype=dtype),
        (1 + 0.3 * randn(heads * head_dim, seed=1)).to(dtype),
        EPS,
        torch.stack([angles.cos(), angles.sin()], dim=-1),
        randn(heads, len(turned), 2, seed=3).to(coefficients),
        still,
        torch.tensor(turned),
        heads,
    )


def wide(given):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in given]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "head_dim", "turned"), [(1, 4, (1,)), (3, 24, (0, 3, 11)), (5, 20, tuple(range(9))), (12, 128, (5, 60))]
)
def test_equals_float64(dtype, heads, head_dim, turned):
    given = inputs(heads=heads, head_dim=head_dim, turned=turned, dtype=dtype)

    found = split_query(*given)

    for part, expected in zip(found, split_query_reference(*wide(given)), strict=True):
        assert part.dtype == dtype and part.is_contiguous()
        assert error(part, expected) < 2 * EPSILON[dtype]  # 2.2e-4 in float16, 1.6e-7 in float32


def test_coefficients_of_another_dtype_and_views():
    given = list(inputs(dtype=torch.float16, coefficients=torch.float16, tokens=10))
    given[0], given[3] = given[0][:, ::2], given[3][::2]
    found = split_query(*given)
    whole = split_query(given[0].contiguous(), *given[1:3], given[3].contiguous(), *given[4:])
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))


def test_opcheck():
    given = inputs()
    torch.library.opcheck(ops.split_query.default, given)
    fused = torch.compile(split_query, fullgraph=True, dynamic=True, backend="eager")
    assert torch.equal(fused(*given)[1], split_query(*given)[1])


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (3, lambda x: x[:4], r"rotations is \[4, 12, 2\], expected \[5, 12, 2\]"),
        (4, lambda x: x[:2], r"coefficients is \[2, 3, 2\], expected \[3, 3, 2\]"),
        (5, lambda x: x[:0], "still_pairs names 0 pairs of 12"),
        (6, lambda x: x.int(), "turned_pairs is torch.int32, expected torch.int64"),
        (7, lambda x: 5, "72 channels are not divisible by 5 heads"),
    ],
)
def test_refusals(place, change, message):
    given = list(inputs())
    given[place] = change(given[place])
    with pytest.raises(ValueError, match=message):
        split_query(*given)


def test_float64_is_refused():
    with pytest.raises(NotImplementedError, match="float64 is not supported"):
        split_query(*wide(inputs()))
