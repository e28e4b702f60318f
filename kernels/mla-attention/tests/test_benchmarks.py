"""The benchmark at a toy size: every part runs, and nothing is reported that should not be."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

PARTS = ("dense", "step", "streams", "attention", "chunk", "profile", "graph", "flex")
GPU_PARTS = ("graph", "streams", "flex")


@pytest.fixture(scope="module")
def bench():
    return importlib.import_module("run")


@pytest.fixture(scope="module")
def result(bench, tmp_path_factory):
    """The results of a run at the toy size, with the smaller of the sizes at which ops are checked."""
    out, checks = tmp_path_factory.mktemp("bench"), importlib.import_module("checks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "SIZES", checks.SIZES[:1])
        assert bench.main(["--tiny", "--device", "cpu", "--out", str(out)]) == 0
    assert not list(out.glob("*.tmp"))
    return json.loads((out / "results.json").read_text()), (out / "results.md").read_text()


def test_every_part_runs(result):
    found, text = result
    assert set(PARTS) | {"checks", "ceilings", "unsplit", "stock", "goals"} <= set(found) and found["tiny"]
    assert found["checks"] == {"failures": []} and found["finished"]
    assert {*PARTS, "start", "checks", "all"} <= set(found["seconds"])
    assert sum(spent for part, spent in found["seconds"].items() if part != "all") <= found["seconds"]["all"]
    assert not [part for part in PARTS if isinstance(found[part], dict) and "failed" in found[part]]
    # Results that need a GPU are empty.
    assert all(found[part] is None for part in GPU_PARTS)
    assert "| streams over dense | 6 | not measured |" in text
    assert found["step"]["refused"] == {} and len(found["step"]["times"]) == 18
    assert set(found["step"]["ratios"]) == set(found["chunk"]["ratios"])
    assert len(found["step"]["ratios"]) == 4 and found["chunk"]["refused"] == {}
    backend = found["stock"]["torch_runs"]
    attends = found["step"]["attends"]
    assert backend.endswith("_ATTENTION") and attends["dense, published code, flash"] == "flash, 1 split"
    best, _, _ = found["stock"]["best"].partition(", ")
    assert attends["dense, published code, best stock"].startswith(best)
    assert attends["dense, tuned, absolute"] == attends["latent 192, rotated on read"] == found["stock"]["best"]
    assert attends["latent 64+32, absorbed, own chunk by stock"] == "latent_attention and flash, merged"
    assert attends["latent 64+32, absorbed"] == "latent_attention and attend, merged"
    assert set(found["chunk"]["attends"]) == set(found["chunk"]["times"])
    assert "these times mean nothing" in text
    # Attention of the step and of the chunk, rows that the chunk writes, and a row of the attention part.
    assert text.count(" compared at full size: the largest difference is ") == 4
    assert text.count("; two runs are equal to the bit.") == 4


def test_attention_has_its_baselines_splits_and_ranks(result):
    (row,) = result[0]["attention"]["rows"]
    names = set(row["times"])
    assert {"flash, 1 split", "flash, 2 splits", "attend, splits by rule", "attend, 5 splits"} <= names
    assert {f"{way}, rank {rank}" for way in ("absorbed", "expand") for rank in (64, 96, 128, 192, 256)} <= names
    mixed = "expand with heads rotated, rank 624, 64 in 8 bits, the others in 4"
    assert {"torch", "expand with heads rotated, rank 192", mixed} <= names and row["torch_runs"]
    assert row["refused"]["flash, 5 splits"] == "8 keys are not divisible by 5"
    assert "cuDNN, 1 split" in row["refused"]
    assert all(
        times["tflop_s"] > 0 and times["rounds"] == 1 and times["by"] == "launch" for times in row["times"].values()
    )


def test_ratios_and_goals_are_those_of_the_medians(result):
    found, _ = result
    medians = {name: times["median_ms"] for name, times in found["step"]["times"].items()}
    for base, ratios in found["step"]["ratios"].items():
        assert ratios == {way: medians[base] / medians[way] for way in medians if way.startswith("latent")}
    published = max(
        v for k, v in found["step"]["ratios"]["dense, published code, flash"].items() if k.startswith("latent 192")
    )
    goal = found["goals"][0]
    assert goal["measured"] == published and goal["reached"] == (published >= 1.3)


def test_a_red_check_takes_its_times_with_it(bench, tmp_path, monkeypatch, capsys):
    """Variants that run the op are not timed, all others are; the failure is in the files and in the exit code."""
    line = "expand_kv_, keys, heads rotated, 12 keys, rank 96: error 1, allowed 0.1"
    monkeypatch.setattr(bench, "check_all", lambda *_: [line])
    monkeypatch.setattr(bench.sizes, "RANKS", (64,))
    arguments = ["--tiny", "--device", "cpu", "--out", str(tmp_path), "--parts", "step", "attention"]
    assert bench.main(arguments) == 1
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["checks"] == {"failures": [line]} and line in capsys.readouterr().err
    text = (tmp_path / "results.md").read_text()
    assert f"- {line}" in text and "latent 192, rotated on read is not timed: expand_kv_ failed its check" in text
    absorbed = {"latent 64+32, absorbed", "latent 192+32, absorbed", "latent 64+32, absorbed, own chunk by stock"}
    assert {name for name in found["step"]["times"] if "latent" in name} == absorbed
    (row,) = found["attention"]["rows"]
    assert not any(name.startswith("expand") for name in row["times"]) and "absorbed, rank 64" in row["times"]


@pytest.mark.parametrize("broken", [False, True])
def test_tiles_that_make_a_check_fail_are_refused(bench, tmp_path, monkeypatch, broken):
    """The package's own tiles are then checked and timed."""
    line = "expand_kv_, keys, 450 keys, rank 192: error 1, allowed 0.1"
    table = bench.tune.expand_tiles.TILES
    own, other = table[90], bench.tune.CANDIDATES[90]["expand_kv"][1]
    seen = []

    def check_all(*_):
        seen.append(table[90])
        if table[90] == own:
            return []
        if broken:
            raise ValueError("no answer")
        return [line]

    monkeypatch.setattr(bench, "check_all", check_all)
    tiles = tmp_path / "tiles.json"
    tiles.write_text(json.dumps({"family": 90, "change": {"expand_kv": list(other)}}))
    arguments = ["--tiny", "--device", "cpu", "--out", str(tmp_path), "--parts", "--tiles", str(tiles)]
    assert bench.main(arguments) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert seen == [other, own] and table[90] == own and found["tiles"] == []
    failures = ["ValueError: no answer"] if broken else [line]
    assert found["tiles_refused"] == {"tiles": [f"expand_kv: {list(other)}"], "failures": failures}
    assert found["checks"] == {"failures": []} and failures[0] in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(
    "text",
    [None, "{", "[]", '{"family": 90}', '{"family": 90, "change": {"expand_kv": [256, 128, 64, 8, 2], "attend": [1]}}'],
)
def test_a_file_of_tiles_that_cannot_be_taken_is_a_warning(bench, tmp_path, monkeypatch, capsys, text):
    monkeypatch.setattr(bench, "check_all", lambda *_: [])
    before, tiles = bench.tune.tables(), tmp_path / "tiles.json"
    if text is not None:
        tiles.write_text(text)
    arguments = ["--tiny", "--device", "cpu", "--out", str(tmp_path), "--parts", "--tiles", str(tiles)]
    assert bench.main(arguments) == 0 and bench.tune.tables() == before
    assert json.loads((tmp_path / "results.json").read_text())["tiles"] == []
    assert capsys.readouterr().err.count(f"warning: ignoring the tiles of {tiles}: ") == 1


def test_a_red_write_takes_the_ways_that_write_with_it(bench):
    sections = importlib.import_module("sections")

    cpu = torch.device("cpu")

    class Way:
        ops, writes = {"attend"}, {"latent_write_"}

    assert list(sections.built({"way": Way}, cpu, {"latent_write_"})[0]) == ["way"]
    assert sections.built({"way": Way}, cpu, {"latent_write_"}, writes=True) == (
        {},
        {"way": "latent_write_ failed its check"},
    )


def test_checks_that_do_not_end_leave_out_all_ways_of_ours(bench, tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("no answer")

    monkeypatch.setattr(bench, "check_all", broken)
    assert bench.main(["--tiny", "--device", "cpu", "--out", str(tmp_path), "--parts", "step"]) == 1
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["checks"] == {"failed": "ValueError: no answer"}
    assert set(found["step"]["times"]) == {"dense, published code, flash", "dense, published code, best stock"}


def test_an_op_that_does_not_run_fails_its_check(bench, monkeypatch):
    checks = importlib.import_module("checks")

    def broken(*_):
        raise RuntimeError("out of resources")

    monkeypatch.setattr(checks.ops, "qk_norm_rope", broken)
    (line,) = checks.check(torch.device("cpu"), torch.float32, 0, 4, 4, 1, 64, 96)
    assert line == "qk_norm_rope, 12 keys, rank 96: RuntimeError: out of resources"
    assert checks.red([line]) == {"qk_norm_rope"}


def test_all_ops_that_are_checked_are_known(bench, monkeypatch):
    """Found from the op names in the failures of a check in which nothing runs."""
    checks = importlib.import_module("checks")

    def broken(*_):
        raise RuntimeError("out of resources")

    for op in checks.CHECKS:
        monkeypatch.setattr(checks.ops, op, broken)
    assert checks.red(checks.check(torch.device("cpu"), torch.float32, 0, 4, 4, 1, 64, 96)) == set(checks.CHECKS)


def test_a_row_that_fails_leaves_the_others(bench):
    sizes, timing, wan = (importlib.import_module(name) for name in ("sizes", "timing", "wan"))
    saved = []

    def row(queries, frames, batch):
        if queries == 1:
            return "row"
        raise RuntimeError("CUDNN_STATUS_ALLOC_FAILED" if queries == 2 else "illegal memory access")

    wanted = [(1, 1, 1), (2, 1, 1), (3, 1, 1), (1, 1, 1)]
    shape = wan.Shape(tokens=4)
    found = sizes._rows(shape, torch.device("cpu"), timing.Budget(60), wanted, saved.append, row)
    assert found == saved[-1] and len(saved) == 4 and found["rows"] == ["row", "row"]
    assert found["left_out"] == ["2 x 4 x 1: RuntimeError: CUDNN_STATUS_ALLOC_FAILED"]
    assert found["failed"] == "3 x 4 x 1: RuntimeError: illegal memory access"


def test_expanding_is_timed_with_the_first_size_that_does_not_fail(bench, monkeypatch):
    sizes, timing, wan = (importlib.import_module(name) for name in ("sizes", "timing", "wan"))
    seen = []

    def timed(case, variants, *_):
        seen.append(any(name.startswith("expand") for name in variants))
        if len(seen) == 1:
            raise RuntimeError("out of memory")
        return "row"

    monkeypatch.setattr(sizes._Case, "timed", timed)
    shape = wan.Shape(layers=1, heads=1, head_dim=64, ffn=32, tokens=4, window=4, chunk=1, text=4)
    wanted, device = [(4, 2, 1), (3, 2, 1), (2, 2, 1)], torch.device("cpu")
    found = sizes.attention(shape, device, torch.float32, 1, timing.Budget(60), wanted, lambda rows: None)
    assert found == {"rows": ["row", "row"], "left_out": ["4 x 8 x 1: RuntimeError: out of memory"]}
    assert seen == [True, True, False]


def test_what_a_part_saved_before_it_failed_stays(bench, tmp_path, monkeypatch):
    def attention(*arguments):
        arguments[6]({"rows": [], "left_out": ["a size"]})
        raise RuntimeError("gone")

    monkeypatch.setattr(bench, "check_all", lambda *_: [])
    monkeypatch.setattr(bench.sizes, "attention", attention)
    assert bench.main(["--tiny", "--device", "cpu", "--out", str(tmp_path), "--parts", "attention"]) == 1
    found = json.loads((tmp_path / "results.json").read_text())["attention"]
    assert found == {"rows": [], "left_out": ["a size"], "failed": "RuntimeError: gone"}
    assert "running" not in json.loads((tmp_path / "results.json").read_text())


def test_a_variant_that_does_not_run_is_named(bench):
    timing = importlib.import_module("timing")

    def broken():
        raise ValueError("too wide")

    found, refused = timing.runnable({"one": lambda: None, "two": broken}, torch.device("cpu"))
    assert list(found) == ["one"] and refused == {"two": "ValueError: too wide"}


def test_the_share_of_attention_is_that_of_dense_operations(bench):
    """It is the rate of the fastest path and of ours; neither expansion nor the savings of a low rank raise it."""
    report = importlib.import_module("report")
    medians = {"cuDNN, 1 split": 2.0, "attend, 2 splits": 4.0, "absorbed, rank 192": 6.0, "absorbed, rank 64": 0.5}
    medians["expand, rank 64"] = 0.1
    row = {"queries": 3, "keys": 6, "batch": 1, "times": {k: {"median_ms": v} for k, v in medians.items()}}
    shape = {"chunk": 1, "window": 2, "tokens": 3, "heads": 2, "head_dim": 128}
    # A matrix product with this many operations takes 1 ms.
    rate = 4 * 2 * 3 * 6 * 128 / 1e9
    others = [{**row, "batch": 4}, {**row, "keys": 3}]
    found = {"shape": shape, "ceilings": {"matmul_tflop_s": rate}, "attention": {"rows": [row, *others]}}
    most, ours = report.goals(found)[-2:]
    assert most["goal"].endswith("at 3 queries and 6 keys, counted as dense: cuDNN, 1 split")
    assert most["measured"] == pytest.approx(0.5) and most["wanted"] == 0.75 and not most["reached"]
    assert ours["goal"].endswith("attend, 2 splits") and ours["measured"] == pytest.approx(0.25)
    assert report.goals({**found, "attention": {"rows": others}})[-1]["measured"] is None


def test_memory_that_ends_is_known_by_any_name(bench):
    timing = importlib.import_module("timing")
    for text in ("CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_NOT_INITIALIZED"):
        assert timing.does_not_fit(RuntimeError(text))
    assert not timing.does_not_fit(RuntimeError("illegal memory access"))
    assert not timing.does_not_fit(ValueError("out of memory"))


def test_a_cudnn_that_is_wrong_is_refused(bench):
    dense = importlib.import_module("dense")
    assert dense.cudnn_refusal(91501, 4680, 32760) is None and dense.cudnn_refusal(91500, 128, 256) is None
    reason = dense.cudnn_refusal(91500, 128, 32760)
    assert reason == "cuDNN 91500 is wrong for lengths not divisible by 128: 32760 (pytorch#169849)"
    assert dense.cudnn_refusal(None, 128) == "torch has no cuDNN"


def test_the_published_code_moves_its_window_once_a_chunk(bench):
    """On the first pass after `start_chunk`; the keys it attends to are normalized, rotated and in place."""
    wan = importlib.import_module("wan")
    shape = wan.Shape(layers=1, heads=2, head_dim=16, ffn=32, tokens=4, window=4, chunk=1, text=4)
    way = wan.Published(shape, torch.device("cpu"), torch.float32, run=lambda query, key, value: key)
    query, key, value = (torch.randn(1, shape.queries, shape.dim) for _ in range(3))
    before = way.keys[0].clone()
    found = way.attend(0, query, key, value).clone()
    assert found.shape == before.shape and torch.equal(found[:, :-4], before[:, :-4])
    normed = torch.nn.functional.rms_norm(key, (shape.dim,), eps=wan.EPS).unflatten(-1, (2, -1))
    each = way._rotated(torch.ones(1, 4, 1, 16).view(1, 4, 1, 16), 3).unflatten(-1, (-1, 2))
    cos, sin = (each[..., 0] + each[..., 1]) / 2, (each[..., 1] - each[..., 0]) / 2
    x, y = normed[..., ::2], normed[..., 1::2]
    torch.testing.assert_close(found[:, -4:], torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1).flatten(-2))
    # At the end of the window, in row 0 and column 1 of its frame.
    angle = 3.0 * 10000.0 ** -(torch.arange(4) / 4)
    torch.testing.assert_close(cos[0, 1, 0, :4], angle.cos())
    way.start_chunk()
    moved = way.attend(0, query, key, value).clone()
    assert torch.equal(moved[:, :-4], found[:, 4:]) and torch.equal(moved[:, -4:], found[:, -4:])
    assert torch.equal(way.attend(0, query, key, value), moved)


def test_a_re_indexed_window_is_normed_and_rotated_whole(bench):
    wan = importlib.import_module("wan")
    shape = wan.Shape(layers=1, heads=2, head_dim=16, ffn=32, tokens=4, window=4, chunk=1, text=4)
    way = wan.Dense(shape, torch.device("cpu"), torch.float32, reindexed=True, run=lambda query, key, value: key)
    query, key, value = (torch.randn(1, shape.queries, shape.dim) for _ in range(3))
    found = way.attend(0, query, key, value)
    assert torch.equal(way.keys[0][:, -shape.queries :].flatten(2), key)
    normed = torch.nn.functional.rms_norm(way.keys[0].flatten(2), (shape.dim,), eps=wan.EPS).unflatten(-1, (2, -1))
    cos, sin = way.window[..., 0].unsqueeze(1), way.window[..., 1].unsqueeze(1)
    x, y = normed[..., ::2], normed[..., 1::2]
    expected = torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1).flatten(-2)
    torch.testing.assert_close(found, expected)


def test_a_pass_that_writes_keeps_the_chunk_of_that_pass(bench):
    """It uses the keys and values of that pass; no other pass writes."""
    wan = importlib.import_module("wan")
    shape = wan.Shape(layers=1, heads=1, head_dim=64, ffn=32, tokens=4, window=4, chunk=1, text=4)
    step = wan.Step(shape, torch.device("cpu"), torch.float32)
    way = wan.Latent(shape, torch.device("cpu"), torch.float32, 64, 32, "absorbed")
    history, own = way.rows[0][:, :3].clone(), way.rows[0][:, 3:].clone()
    step(way)
    assert torch.equal(way.rows[0][:, 3:], own)
    way.writing = True
    step(way)
    assert torch.equal(way.rows[0][:, :3], history) and not torch.equal(way.rows[0][:, 3:], own)


def test_graphs_are_timed_with_launches_beside(bench, monkeypatch):
    timing = importlib.import_module("timing")
    monkeypatch.setattr(timing, "graphs", lambda variants, device: ({"one": variants["one"]}, {"two": "it waits"}))
    found = timing.both(dict.fromkeys(("one", "two"), lambda: None), 5, torch.device("cpu"))
    assert list(found) == ["one", "two"] and all(times["rounds"] == 5 for times in found.values())
    assert found["one"]["by"] == "graph" and found["one"]["launched_ms"] > 0
    assert found["two"]["by"] == "launch" and found["two"]["not_captured"] == "it waits"


def test_what_time_does_not_allow_is_named(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "check_all", lambda *_: [])
    bench.main(["--tiny", "--device", "cpu", "--out", str(tmp_path), "--budget", "0", "--parts", "attention"])
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["attention"] == {"left_out": ["all of attention: no time was left"]}
    assert "Left out of attention: all of attention: no time was left" in (tmp_path / "results.md").read_text()


def test_the_budget_counts_from_the_start_of_the_command(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "check_all", lambda *_: [])
    started = bench.time.monotonic() - 100
    arguments = ["--tiny", "--device", "cpu", "--out", str(tmp_path), "--budget", "90", "--parts", "step"]
    assert bench.main(arguments, started) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert "times" not in found["step"] and found["seconds"]["all"] >= 100


def test_sizes_that_time_does_not_allow_are_named(bench):
    sizes, timing, wan = (importlib.import_module(name) for name in ("sizes", "timing", "wan"))
    found = sizes._rows(wan.Shape(tokens=4), torch.device("cpu"), timing.Budget(0), [(4, 2, 1)], None, None)
    assert found == {"rows": [], "left_out": ["4 x 8 x 1"]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_it_says_so(bench, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main([])
    assert ended.value.code == 1 and "no CUDA device" in capsys.readouterr().err


def test_an_entry_of_the_device_table(bench, tmp_path):
    device_costs = importlib.import_module("device_costs")

    def row(queries, absorbed, **more):
        # The model runs neither split stock attention nor our attention with the best number of splits.
        rates = {"torch": 500, "cuDNN, 2 splits": 600, "attend, 2 splits": 550, "attend, splits by rule": 400}
        rates |= {"absorbed, rank 192": absorbed, **more}
        times = {name: {"tflop_s": rate} for name, rate in rates.items()}
        return {"batch": 1, "queries": queries, "keys": 32760, "times": times}

    rows = [row(4680, 250, **{"expand, rank 192": 250}), row(128, 500)]
    found = {
        "device": "a GPU", "torch": "2", "triton": "3", "tiny": False,
        "shape": {"window": 21, "tokens": 1560}, "attention": {"rows": rows},
    }  # fmt: skip
    assert device_costs.entry(found) == {
        "source": "kernels/mla-attention/benchmarks/run.py, torch 2, triton 3",
        "queries": [128, 4680],
        "attention": {"sdpa": [1.0, 1.0], "attend": [1.25, 1.25], "absorbed": [1.0, 2.0]},
        "expand": 2.0,
    }
    with pytest.raises(ValueError, match="expand, rank 192 was not measured"):
        device_costs.entry(found | {"attention": {"rows": rows[1:]}})
    path, table = tmp_path / "results.json", tmp_path / "table.json"
    path.write_text(json.dumps(found))
    table.write_text(device_costs.TABLE.read_text())
    assert device_costs.main([str(path), "--table", str(table)]) == 0
    assert set(json.loads(table.read_text())) == {*json.loads(device_costs.TABLE.read_text()), "a GPU"}
    path.write_text(json.dumps(found | {"tiny": True}))
    with pytest.raises(SystemExit):
        device_costs.main([str(path), "--table", str(table)])
