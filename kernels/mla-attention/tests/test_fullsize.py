"""Timed work is compared at its full size; results that are wrong there, or differ between runs, are not timed."""

from __future__ import annotations

import importlib

import pytest
import torch

CPU = torch.device("cpu")


def test_what_differs_is_told():
    fullsize = importlib.import_module("fullsize")
    x = torch.ones(3)
    assert fullsize.verdict(lambda: x, lambda: x) == ({"error": 0.0, "equal": True}, None)
    _, wrong = fullsize.verdict(lambda: x, lambda: 2 * x)
    assert wrong == "differs at full size by 5.0e-01 of the largest output"
    assert "by nan" in fullsize.verdict(lambda: x * float("nan"), lambda: x)[1]
    values = iter((x, 1.001 * x, x, 1.001 * x))
    assert fullsize.verdict(lambda: next(values), lambda: x)[1] == "two runs differ"
    found, wrong = fullsize.verdict(lambda: next(values), lambda: x, strict=False)
    assert not found["equal"] and wrong is None
    # The whole result must be equal in two runs, even if only a part is compared with the expected one.
    assert fullsize.verdict(lambda: [x, 2 * x], lambda: x, read=lambda found: found[0])[1] is None


def test_the_queries_of_a_sample_hold_as_many_logits_as_fit():
    fullsize = importlib.import_module("fullsize")
    assert fullsize.sampled(4680, 12 * 32760) == slice(None, None, 8)
    assert fullsize.sampled(4, 12) == slice(None, None, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 32, "shared": 16, "path": "absorbed"},
        {"rank": 32, "shared": 16, "path": "expand"},
        {"rank": 32, "shared": 0, "path": "expand"},
        {"rank": 32, "shared": 0, "path": "expand", "keep": True},
        {"rank": 32, "shared": 0, "path": "expand", "together": 2},
        {"rank": 32, "shared": 0, "path": "expand", "ahead": True},
        {"rank": 32, "shared": 16, "path": "expand", "apart": "flash"},
    ],
)
def test_every_way_agrees_with_plain_torch(options, monkeypatch):
    """A path with a wrong kernel does not agree."""
    fullsize, wan = importlib.import_module("fullsize"), importlib.import_module("wan")
    shape = wan.Shape(layers=2, heads=1, head_dim=32, ffn=32, tokens=4, window=4, chunk=1, text=4)
    way = wan.Latent(shape, CPU, torch.float32, **options)
    found, wrong = fullsize.way_agrees(way, shape, CPU, torch.float32)
    assert wrong is None and found["equal"] and found["error"] < 1e-4
    assert way.kernels is fullsize.ops and way.run is None
    found, wrong = fullsize.writes_agree(way, shape, CPU, torch.float32)
    assert wrong is None and (found is None) == ("together" in options)
    real = fullsize.ops.attend

    def broken(*arguments):
        out, lse = real(*arguments)
        return 2 * out, lse

    monkeypatch.setattr(fullsize.ops, "attend", broken)
    wrong = fullsize.way_agrees(way, shape, CPU, torch.float32)[1]
    assert wrong is None if "apart" in options else "differs at full size" in wrong


def test_what_is_wrong_at_a_size_is_not_timed(monkeypatch):
    sizes, timing, wan = (importlib.import_module(name) for name in ("sizes", "timing", "wan"))
    shape = wan.Shape(layers=1, heads=1, head_dim=64, ffn=32, tokens=4, window=4, chunk=1, text=4)
    monkeypatch.setattr(sizes, "RANKS", (32,))
    real = sizes.ops.expand_kv_

    def broken(key, *arguments):
        real(key, *arguments)
        key += 1

    monkeypatch.setattr(sizes.ops, "expand_kv_", broken)
    found = sizes.attention(shape, CPU, torch.float32, 1, timing.Budget(60), [(4, 2, 1)], lambda rows: None)
    (row,) = found["rows"]
    assert "expand, rank 32" not in row["times"] and "differs at full size" in row["refused"]["expand, rank 32"]
    assert row["checked"]["absorbed, rank 32"]["equal"] and "absorbed, rank 32" in row["times"]
    assert row["checked"]["attend, splits by rule"]["error"] < 1e-4
