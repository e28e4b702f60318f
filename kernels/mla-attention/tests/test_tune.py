"""The search for tiles at a toy size: candidates are compared, timed and written; those that fail are left out."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from mla_attention import attend_tiles, expand_tiles, latent_tiles
from mla_attention.expand_kv import expand_plan


@pytest.fixture(scope="module")
def tune():
    return importlib.import_module("tune")


def test_candidates_are_compared_timed_and_written(tune, tmp_path, capsys):
    out = tmp_path / "tiles.json"
    arguments = ["--tiny", "--device", "cpu", "--ops", "expand_kv", "--workers", "2", "--out", str(out)]
    # Far more than it takes, so that a busy machine leaves no candidate out.
    arguments += ["--budget", "3600"]

    assert tune.main(arguments) == 0

    found = json.loads(out.read_text())
    assert found["tiny"] and found["family"] == 80 and found["refused"] == {}
    assert {tuple(tiles) for tiles in tune.CANDIDATES[80]["expand_kv"]} == {
        tuple(json.loads(name.replace("(", "[").replace(")", "]"))) for name in found["times"]["expand_kv"]
    }
    assert all(times["by"] == "launch" for times in found["times"]["expand_kv"].values())
    assert "expand_kv" in capsys.readouterr().out


@pytest.mark.parametrize("op", ["attend", "latent_attention, rank 64"])
def test_every_op_can_be_checked(tune, op):
    assert tune.check(op, 0, 80, tune.torch.device("cpu"), tune.torch.float16, True) < 1e-2


def test_a_candidate_that_fails_is_told(tune):
    found = tune.checked([("attend", 99)], 80, "cpu", True, 1, tune.Budget(60))
    assert "IndexError" in found["attend", 99]
    assert tune.checked([("attend", 0)], 80, "cpu", True, 1, tune.Budget(0)) == {("attend", 0): "time ended"}


def test_tables_are_as_before(tune):
    before = dict(attend_tiles.TILES), dict(attend_tiles.DESCRIBED), dict(latent_tiles.TILES)
    described = attend_tiles.Tiles(128, 128, 8, 2, described=True)
    with tune.table("attend", described, 90):
        assert attend_tiles.DESCRIBED.get(90) == described
    with tune.table("latent_attention, rank 96", tune.CANDIDATES[90]["latent_attention, rank 96"][1], 90):
        assert [limit for limit, _ in latent_tiles.TILES[90]] == [64, 96, 256, 512]
    other = tune.CANDIDATES[90]["latent_attention, rank 128"][1]
    with tune.table("latent_attention, rank 128", other, 90):
        # Rank 96 keeps its tiles until an entry for it replaces them.
        kept = before[2][90][1][1]
        assert latent_tiles.TILES[90][1:3] == [(96, kept), (128, other)]
        tune.enter("latent_attention, rank 96", other, 90)
        assert [limit for limit, _ in latent_tiles.TILES[90]] == [64, 96, 128, 256, 512]
        assert latent_tiles.TILES[90][1:4] == [(96, other), (128, other), (256, kept)]
    with tune.table("latent_attention, rank 192", other, 80):
        assert latent_tiles.TILES[80][:3] == [(128, before[2][80][0][1]), (192, other), before[2][80][1]]
    assert before == (attend_tiles.TILES, attend_tiles.DESCRIBED, latent_tiles.TILES)


def test_only_what_is_faster_changes(tune, tmp_path, monkeypatch):
    own, other, *_ = tune.CANDIDATES[90]["attend"]
    right = {"attend": [own, other]}

    def times(first, second):
        return {"attend": {str(tuple(own)): {"median_ms": first}, str(tuple(other)): {"median_ms": second}}}

    assert tune.changes(90, right, times(1.0, 0.995), {}) == {}
    assert tune.changes(90, right, times(1.0, 0.9), {}) == {"attend": list(other)}
    # If the table's tiles have no time, another candidate is better only if they failed.
    alone, name = {"attend": {str(tuple(other)): {"median_ms": 1.0}}}, f"attend {tuple(own)}"
    assert tune.changes(90, right, alone, {name: "time ended"}) == {}
    assert tune.changes(90, right, alone, {name: "error 1.0e+00, allowed 0.016"}) == {"attend": list(other)}
    # None of them ran.
    assert tune.changes(90, right, {"attend": {}}, {}) == {}
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"family": 90, "change": {"attend": list(other)}}))
    with tune.table("attend", own, 90):
        assert tune.use(path) == [f"attend: {list(other)}"]
        assert attend_tiles.TILES[90][0] == (128, other)


def test_the_first_candidates_are_those_of_the_tables(tune):
    for family in (80, 90, 100):
        for op, (own, *_) in tune.CANDIDATES[family].items():
            if op == "attend":
                assert own == attend_tiles.DESCRIBED.get(family, attend_tiles.TILES[family][0][1])
            elif op.startswith("latent"):
                rank = int(op.rpartition(" ")[2])
                assert own == next(tiles for limit, tiles in latent_tiles.TILES[family] if rank <= limit)


def test_the_tiles_of_the_tables_are_checked_first(tune, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(tune, "checked", lambda todo, *_: seen.extend(todo) or dict.fromkeys(todo, tune.TIME_ENDED))
    out = tmp_path / "tiles.json"
    assert tune.main(["--tiny", "--device", "cpu", "--out", str(out)]) == 0
    first = len(tune.CANDIDATES[80])
    assert [op for op, index in seen[:first] if index == 0] == list(tune.CANDIDATES[80])
    assert len(seen) == sum(map(len, tune.CANDIDATES[80].values()))
    assert json.loads(out.read_text())["change"] == {}


def test_what_ends_with_the_budget_counts(tune, monkeypatch):
    """When time runs out, one of two processes has finished; the other is killed and waited for."""
    events = []

    class Process:
        def __init__(self, command, stdout, **_):
            self.index = int(command[command.index("--check") + 2])
            stdout.write("0.001\n")

        def poll(self):
            return 0 if self.index == 0 else None

        def kill(self):
            events.append(("kill", self.index))

        def wait(self, timeout):
            events.append(("wait", self.index))

    class Clock:
        left = iter((1, 1, 0)).__next__

    monkeypatch.setattr(importlib.import_module("processes").subprocess, "Popen", Process)
    found = tune.checked([("attend", index) for index in range(2)], 80, "cpu", True, 2, Clock)
    assert found == {("attend", 0): 0.001, ("attend", 1): "time ended"}
    assert events == [("kill", 1), ("wait", 1)]


def test_no_two_candidates_of_a_rank_are_the_same_plan(tune):
    for family, by_op in tune.CANDIDATES.items():
        for op in by_op.keys() - {"attend", "expand_kv"}:
            rank, plans = int(op.rpartition(" ")[2]), []
            for tiles in by_op[op]:
                with tune.table(op, tiles, family):
                    plans.append(latent_tiles.latent_plan(rank, 32, 4680, tune.torch.bfloat16, False, False, family))
            assert not [plan for place, plan in enumerate(plans) if plan in plans[:place]], (family, rank)


def test_rows_that_were_not_measured_keep_their_tiles(tune):
    """Mixed rows, and ranks that 4 does not divide, need more registers than what is measured."""
    heads = (128, 12, torch.bfloat16, 90)
    kept = [
        ((90, *heads), 128),
        ((192, *heads, 64), 128),
        ((121, *heads), 64),
        ((121, *heads, 41, 1), 64),
        ((192, *heads, 64, 1), 64),
    ]
    for tiles in (expand_tiles.TILES[90], expand_tiles.Tiles(256, 256, 64, 4, 2)):
        with tune.table("expand_kv", tiles, 90):
            assert expand_plan(192, *heads).constants["BLOCK_M"] == tiles.block_m
            for given, rows in kept:
                plan = expand_plan(*given)
                assert (plan.constants["BLOCK_M"], plan.num_warps, plan.num_stages) == (rows, 8, 3)


def test_only_odd_sizes_narrow_the_tiles():
    wide = [(90, None, 2), (90, 26, 2), (250, 22, 2), (448, 64, 16)]
    narrow = [(121, None, 1), (90, 25, 1), (121, 41, 1), (448, 62, 1)]
    for cases, rows in ((wide, 128), (narrow, 64)):
        for rank, eight, align in cases:
            plan = expand_plan(rank, 128, 12, torch.bfloat16, 90, eight, align)
            assert plan.constants["BLOCK_M"] == rows, (rank, eight, align)
