"""Rows in reading order."""

from __future__ import annotations

import pytest
import torch
from kernel_case import DTYPES, EPSILON, error, ring, unit_rotations, with_tables
from mla_attention.pack import packed_rows


@pytest.mark.parametrize("tables", [None, "rings", "pool"])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_latents_and_rotated_shared_keys_with_zeros_behind_them(dtype, quantized, tables):
    cached = ring(72 + 12, dtype, tokens=43, tail=40, quantized=quantized)
    turn = unit_rotations(4 * 43, 6)
    valid = cached.valid
    found = cached if tables is None else with_tables(cached, tables == "pool")

    packed = packed_rows(*found[:4], turn, 2, 72, 80, 16, dtype)[:, : valid.shape[1]]

    pairs = torch.view_as_complex(valid[..., 72:].unflatten(-1, (-1, 2)).contiguous())
    shared = torch.view_as_real(pairs * torch.view_as_complex(turn[: valid.shape[1]].double())).flatten(-2)
    assert packed.dtype == dtype and packed.shape[2] == 96
    assert error(packed[..., :72], valid[..., :72]) <= (2 if quantized else 0) * EPSILON[dtype]
    assert error(packed[..., 80:92], shared) < 4 * EPSILON[dtype]
    assert not packed[..., 72:80].any() and not packed[..., 92:].any()


def test_without_shared_keys():
    cached = ring(48, torch.float32)
    packed = packed_rows(*cached[:4], None, 2, 48, 48, 0, torch.float32)
    assert torch.equal(packed[:, : cached.valid.shape[1]].double(), cached.valid)
