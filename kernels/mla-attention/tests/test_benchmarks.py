"""The benchmark at a toy size: every part runs, and nothing is reported that should not be."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PARTS = ("step", "chunk", "graph", "profile", "streams", "attention")


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module("run")


@pytest.fixture(scope="module")
def result(bench, tmp_path_factory):
    """What a run of the toy size wrote."""
    out = tmp_path_factory.mktemp("bench")
    assert bench.main(["--tiny", "--device", "cpu", "--out", str(out)]) == 0
    assert not list(out.glob("*.tmp"))
    return json.loads((out / "results.json").read_text()), (out / "results.md").read_text()


def test_every_part_runs(result):
    found, text = result
    assert set(PARTS) | {"ceilings", "stock", "goals"} <= set(found) and found["tiny"]
    assert not [part for part in PARTS if isinstance(found[part], dict) and "failed" in found[part]]
    # What needs a GPU is empty, not invented.
    assert found["graph"] is None and found["streams"] is None
    assert found["step"]["refused"] == {} and len(found["step"]["times"]) == 14
    assert set(found["step"]["ratios"]) == set(found["chunk"]["ratios"])
    assert len(found["step"]["ratios"]) == 3
    assert "these times mean nothing" in text


def test_attention_has_its_baselines_splits_and_ranks(result):
    (row,) = result[0]["attention"]["rows"]
    names = set(row["times"])
    assert {"flash, 1 split", "flash, 2 splits", "attend, splits by rule", "attend, 5 splits"} <= names
    assert {f"{way}, rank {rank}" for way in ("absorbed", "expand") for rank in (64, 96, 128, 192, 256)} <= names
    assert row["refused"]["flash, 5 splits"] == "8 keys are not divided by 5"
    assert "cuDNN, 1 split" in row["refused"]
    assert all(times["tflop_s"] > 0 and times["rounds"] == 1 for times in row["times"].values())


def test_ratios_and_goals_are_those_of_the_medians(result):
    found, _ = result
    medians = {name: times["median_ms"] for name, times in found["step"]["times"].items()}
    for base, ratios in found["step"]["ratios"].items():
        assert ratios == {way: medians[base] / medians[way] for way in medians if way.startswith("latent")}
    published = max(
        v for k, v in found["step"]["ratios"]["dense, published code"].items() if k.startswith("latent 192")
    )
    goal = found["goals"][0]
    assert goal["measured"] == published and goal["reached"] == (published >= 1.3)


def test_a_red_check_reports_nothing(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "check_all", lambda *_: ["attend: error 1, allowed 0.1"])
    with pytest.raises(SystemExit) as ended:
        bench.main(["--tiny", "--device", "cpu", "--out", str(tmp_path / "out")])
    assert ended.value.code == 1 and not (tmp_path / "out").exists()
    assert "attend: error 1, allowed 0.1" in capsys.readouterr().err


def test_what_time_does_not_allow_is_named(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "check_all", lambda *_: [])
    bench.main(["--tiny", "--device", "cpu", "--out", str(tmp_path), "--budget", "0", "--parts", "attention"])
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["attention"] == {"rows": [], "left_out": ["4 x 8 x 1"]}
    assert "Left out of attention: 4 x 8 x 1" in (tmp_path / "results.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_it_says_so(bench, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main([])
    assert ended.value.code == 1 and "no CUDA device" in capsys.readouterr().err


def test_an_entry_of_the_device_table(bench, tmp_path):
    device_costs = importlib.import_module("device_costs")

    def row(queries, absorbed):
        rates = {"flash, 1 split": 400, "cuDNN, 1 split": 500, "cuDNN, 2 splits": 600, "attend, 2 splits": 550}
        rates |= {"absorbed, rank 192": absorbed, "expand, rank 192": 300}
        times = {name: {"tflop_s": rate} for name, rate in rates.items()}
        return {"batch": 1, "queries": queries, "keys": 32760, "times": times}

    found = {
        "device": "a GPU", "torch": "2", "triton": "3", "tiny": False,
        "shape": {"window": 21, "tokens": 1560}, "attention": {"rows": [row(4680, 300), row(128, 600)]},
    }  # fmt: skip
    assert device_costs.entry(found) == {
        "source": "kernels/mla-attention/benchmarks/run.py, torch 2, triton 3",
        "queries": [128, 4680],
        "attention": {"sdpa": [1.2, 1.2], "attend": [1.0909, 1.0909], "absorbed": [1.0, 2.0]},
        "expand": 2.0,
    }
    path, table = tmp_path / "results.json", tmp_path / "table.json"
    path.write_text(json.dumps(found))
    table.write_text(device_costs.TABLE.read_text())
    assert device_costs.main([str(path), "--table", str(table)]) == 0
    assert set(json.loads(table.read_text())) == {*json.loads(device_costs.TABLE.read_text()), "a GPU"}
    path.write_text(json.dumps(found | {"tiny": True}))
    with pytest.raises(SystemExit):
        device_costs.main([str(path), "--table", str(table)])
