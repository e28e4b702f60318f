"""A process that fails, hangs or loses its device costs only itself, not earlier results."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

CPU = torch.device("cpu")
FIRST = {"device": "a GPU", "torch": "2", "triton": "3", "tiny": True, "dtype": "bfloat16"}
FIRST["shape"] = {"chunk": 1, "tokens": 4, "window": 4}


@pytest.fixture
def watch(monkeypatch):
    found = importlib.import_module("watch")
    monkeypatch.setattr(found.NOW, "barred", {})
    return found


@pytest.fixture
def left(monkeypatch):
    """The exit code of a process, raised instead of exiting."""

    class Left(BaseException):
        pass

    def leave(code):
        raise Left(code)

    monkeypatch.setattr(importlib.import_module("record"), "leave", leave)
    return Left


def test_an_op_is_checked_in_a_process_of_its_own():
    checks, timing = importlib.import_module("checks"), importlib.import_module("timing")
    assert checks.isolated(CPU, timing.Budget(120), ["merge_pair"]) == []
    (line,) = checks.isolated(CPU, timing.Budget(0), ["attend"])
    assert line == "attend, in a process of its own: time ended" and checks.red([line]) == {"attend"}


def test_commands_that_fail_or_hang_end_no_other():
    processes, timing = importlib.import_module("processes"), importlib.import_module("timing")
    codes = {"right": "print('[1]')", "wrong": "raise ValueError('no')", "hangs": "import time; time.sleep(60)"}
    commands = {key: [sys.executable, "-c", code] for key, code in codes.items()}
    found = processes.together(commands, 3, timing.Budget(10))
    assert found == {"right": [1], "wrong": "ValueError: no", "hangs": processes.TIME_ENDED}


def test_a_run_goes_on_without_what_lost_its_device(watch, left, tmp_path, monkeypatch):
    record, timing = importlib.import_module("record"), importlib.import_module("timing")
    run = record.Record(tmp_path, FIRST)
    run.measure("ceilings", lambda: {"copy_tb_s": 1.0, "matmul_tflop_s": 2.0}, CPU, 9)

    def broken():
        watch.mark("latent 64")
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(watch, "answers", lambda device: False)
    with pytest.raises(left, match=str(watch.LOST)):
        run.measure("step", lambda: timing.runnable({"latent 64": broken}, CPU), CPU, 9)
    monkeypatch.undo()
    after = record.Record(tmp_path, FIRST, resume=True)
    assert after.done("ceilings") and not after.done("step") and after.result["ceilings"]["copy_tb_s"] == 1.0
    assert "running" not in after.result and after.result["lost"][0]["name"] == "latent 64"
    assert "an illegal memory access" in (tmp_path / "results.md").read_text()
    found, refused = timing.runnable({"latent 64": broken, "dense": lambda: None}, CPU)
    assert list(found) == ["dense"] and "an illegal memory access" in refused["latent 64"]
    # Results of another device are not kept.
    assert not record.Record(tmp_path, {**FIRST, "device": "another"}, resume=True).done("ceilings")


def test_a_part_that_ends_its_process_without_a_word_is_not_tried_again(watch, left, tmp_path):
    record = importlib.import_module("record")
    run = record.Record(tmp_path, FIRST)
    with pytest.raises(KeyboardInterrupt):
        run.measure("chunk", lambda: (_ for _ in ()).throw(KeyboardInterrupt), CPU, 9)
    assert "Not finished: these are the results up to chunk." in (tmp_path / "results.md").read_text()
    after = record.Record(tmp_path, FIRST, resume=True)
    assert after.done("chunk") and json.loads((tmp_path / "results.json").read_text())["chunk"] == {
        "failed": "its process ended without an error message"
    }


def test_a_call_that_does_not_end_ends_the_process(watch):
    ended = []
    watch.mark("attend")
    thread = watch.guard(lambda: ended.append(watch.NOW.name), patience=0.05)
    thread.join(10)
    assert ended == ["attend"]


def test_a_round_is_saved_before_the_next():
    timing, seen = importlib.import_module("timing"), []
    timing.interleaved({"one": lambda: None}, 4, CPU, each=lambda found: seen.append(found["one"]["rounds"]))
    assert seen == [1, 2, 3, 4]


def test_a_way_by_plain_torch_does_as_the_one_by_kernels():
    plain, wan = importlib.import_module("plain"), importlib.import_module("wan")
    shape = wan.Shape(layers=1, heads=2, head_dim=16, ffn=32, tokens=4, window=4, chunk=1, text=4)
    given = [torch.randn(1, shape.queries, shape.dim) for _ in range(3)]
    found = []
    for kernels in (importlib.import_module("mla_attention"), plain):
        torch.manual_seed(0)
        way = wan.Dense(shape, CPU, torch.float32, reindexed=True, kernels=kernels)
        found.append(way.attend(0, *given))
    torch.testing.assert_close(*found)
    assert way.ops == set()


def test_loops_are_counted_in_front_of_the_end_alone():
    """The end is a jump to itself, with or without an exit before it."""
    aot = importlib.import_module("aot")
    codes = ["MOV", "@P0 EXIT", "HGMMA", "@P1 BRA 0x20", "{exit}", "BRA 0x50", "NOP", "BRA 0x40"]
    for leave in ("EXIT", "@!P1 EXIT"):
        lines = [f"/*{16 * place:04x}*/  {code.format(exit=leave)} ;" for place, code in enumerate(codes)]
        assert aot.counted("\n".join(lines)) == {"instructions": 8, "loop": 2}


@pytest.mark.parametrize("right", [True, False])
def test_measured_tiles_replace_those_that_failed_unless_they_fail_too(watch, tmp_path, monkeypatch, right):
    bench, record, timing = (importlib.import_module(name) for name in ("run", "record", "timing"))
    run, asked, own = record.Record(tmp_path, FIRST), [], bench.tune.expand_tiles.TILES[90]
    other, line = bench.tune.CANDIDATES[90]["expand_kv"][1], "expand_kv_, keys, 450 keys, rank 192: error 1"

    def isolated(device, budget, ops, tiles):
        asked.append((ops, tiles))
        return [] if tiles and right else [line]

    def together(commands, workers, budget):
        path = Path(commands["tune"][commands["tune"].index("--out") + 1])
        found = {"family": 90, "change": {"expand_kv": list(other)}, "times": {}, "refused": {}}
        path.write_text(json.dumps(found))
        return {"tune": "a table"}

    monkeypatch.setattr(bench, "isolated", isolated)
    monkeypatch.setattr(bench.processes, "together", together)
    chosen = bench.parse(["--tiny", "--device", "cpu", "--out", str(tmp_path), "--parts", "tune"])

    def measure(part, work):
        run.result[part] = work()

    shipped = bench.tune.tables()
    try:
        wrong = bench.known(run, measure, chosen, torch.device("cuda"), torch.bfloat16, timing.Budget(300))
        assert bench.tune.expand_tiles.TILES[90] == (other if right else own)
    finally:
        bench.tune.restore(shipped)
    assert asked == [(None, None), (["expand_kv_"], tmp_path / "tiles.json")]
    assert wrong == (set() if right else {"expand_kv_"}) and run.result["checks"]["failures"] == [line] * (not right)
    assert ("tiles_refused" in run.result) == (not right) and run.result["tune"]["change"]
