"""The rule by which keys are split over programs."""

from __future__ import annotations

import pytest
import torch
from mla_attention.splits import MOST, multiprocessors, split_count


@pytest.mark.parametrize(
    ("tiles", "key_blocks", "units", "expected"),
    [
        (444, 512, 132, 2),  # Wan2.1-1.3B, batch 1: seven half rounds instead of four whole ones
        (132, 512, 132, 1),  # a full round has nothing to gain
        (12, 512, 132, 8),
        (12, 8, 132, 2),  # programs keep four blocks of keys
        (12, 3, 132, 1),
        (100_000, 512, 132, 1),
        (12, 512, 1, 1),  # the interpreter
        (0, 512, 132, 1),
    ],
)
def test_splits(tiles, key_blocks, units, expected):
    assert split_count(tiles, key_blocks, units) == expected
    assert expected <= MOST


def test_only_cuda_devices_have_several():
    assert multiprocessors(torch.device("cpu")) == 1
