"""The rule that splits keys over programs."""

from __future__ import annotations

import pytest
import torch
from mla_attention._runtime import Plan
from mla_attention.splits import MOST, multiprocessors, programs, resident, split_count


@pytest.mark.parametrize(
    ("tiles", "key_blocks", "units", "expected"),
    [
        (444, 512, 132, 2),  # Wan2.1-1.3B, batch 1: seven half rounds instead of four whole ones
        (132, 512, 132, 1),  # a full round has nothing to gain
        (12, 512, 132, 8),
        (12, 8, 132, 2),  # programs keep four blocks of keys
        (12, 3, 132, 1),
        (444, 512, 264, 4),  # two programs a multiprocessor: seven quarter rounds instead of two
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


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "capability", "expected"),
    [
        (8, 0, 192 << 10, 90, 1),
        (8, 128, 60 << 10, 90, 2),
        (4, 0, 96 << 10, 90, 2),
        (4, 0, 160 << 10, 90, 1),
        (4, 128, 48 << 10, 90, 4),
        (4, 0, 44 << 10, 80, 2),
        (4, 0, 64 << 10, 86, 1),
        (8, 0, 300 << 10, 100, 1),
    ],
)
def test_programs_of_a_multiprocessor(warps, registers, shared, capability, expected):
    assert resident(Plan({}, warps, 2, registers), shared, capability) == expected


def test_the_interpreter_runs_one_program(monkeypatch):
    plan = Plan({}, 4, 2)
    assert programs(torch.device("cpu"), plan, 0) == 1
    monkeypatch.setattr("mla_attention.splits.multiprocessors", lambda device: 132)
    assert programs(torch.device("cpu"), plan, 0) == 264
