"""Comparison of finished runs: what the page shows, what it refuses, and equal bytes for equal runs."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from mla_convert.cli import main
from mla_convert.errors import UsageError, UserError
from mla_convert.evaluate import compare_tables as tables
from mla_convert.pipeline.comparison import compare_runs

RECIPE = {"name": "x", "convert": {"kv_lora_rank": 20}, "distill": [{"stage": "match_velocity", "steps": 100}]}
GENERATE = {"prompts": ["7 at 2,2 moving up", "3 at <0,0> moving left"], "fps": 8}


def estimate(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def bench(student: float) -> dict[str, Any]:
    values = {"real": 1.0, "teacher": 0.98, "student": student}
    return {
        "prompts": 24,
        "seeds": 1,
        "clip_frames": 16,
        "lengths": {"8x": {name: {"digit_accuracy": estimate(mean, 0.02)} for name, mean in values.items()}},
        "digit_accuracy_by_frame": {name: [mean] * 128 for name, mean in values.items()},
    }


def report(name: str, rank: int, loss: float, student: float) -> dict[str, Any]:
    """The parts of a run folder that a comparison reads."""
    return {
        "name": name,
        "source": "zoo:digits",
        "dense_scalars_per_token": 384,
        "latent_scalars_per_token": rank,
        "latent_cache_bytes": 3000 * rank,
        "dense_cache_bytes": 3000 * 384,
        "teacher_loss": 0.2,
        "converted_loss": 1.5 * loss,
        "student_loss": loss,
        "loss_increase": loss / 0.2 - 1,
        "velocity_rel_error": 0.04,
        "velocity_rel_error_by_timestep": [[0.1, 0.03], [0.9, None]],
        "attention_rel_error": [0.03, None, 0.05],
        "accuracy": {"teacher": {"1x": 1.0, "8x": 0.98}, "student": {"1x": 1.0, "8x": student}},
        "digits_bench": bench(student),
        "curves": [
            {"stage": stage, "step": step, "loss": 1 / step, "heldout_loss": 0.3 if step % 5 == 0 else None}
            for stage in ("one", "two")
            for step in range(1, 11)
        ],
        "recipe": yaml.safe_dump({**RECIPE, "convert": {"kv_lora_rank": rank}, "generate": GENERATE}),
        "seconds": {"total": 100},
        "layout": {"position": "decoupled", "own_chunk": "exact", "kv_lora_rank": [rank] * 3},
    }


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two run folders whose students have the same teacher and drew the same prompts."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.rand(2, 1, 12, 16, 16, generator=generator)
    folders = []
    for name, rank, loss, student in (("wide", 28, 0.202, 0.96), ("narrow", 14, 0.21, 0.7)):
        folder = tmp_path / name
        (folder / "samples").mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps(report(name, rank, loss, student)))
        drawn = {"teacher": teacher, "student": torch.rand(2, 1, 12, 16, 16, generator=generator)}
        save_file(drawn, folder / "samples" / "rollouts.safetensors")
        folders.append(folder)
    return folders


def text_of(page: Path) -> str:
    html = re.sub(r"<(style|script)>.*?</\1>", "", page.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html)).replace("\N{NO-BREAK SPACE}", " ")


def test_the_page_holds_both_runs_and_needs_no_network(runs: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "compare.html"
    compare_runs(runs, page)
    html, text = page.read_text(), text_of(page)
    for expected in (
        "wide against narrow", "28 (wide), 14 (narrow)", "+1.0 % (wide), +5.0 % (narrow)",
        "Held-out loss 0.2000 0.2020 0.2100 +4.0 %", "Cached scalars per token per layer 384 28 14 −50.0 %",
        "Digits recognized at 8× length 98.0 % 96.0 % 70.0 % −26.0 points", "convert.kv_lora_rank 28 14",
        "128 frames (8 × the training length)", "7 at 2,2 moving up", "3 at &lt;0,0&gt; moving left",
        "Training steps – 20 20",
    ):  # fmt: skip
        assert expected in text, expected
    assert len(re.findall(r'<video src="data:video/mp4', html)) == 2 * 3
    assert not re.search(r'(?:src|href)="(?!data:|#)', html) and not re.search(r"url\((?!#)|@import|<link", html)
    charts = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(charts) == 5 and all("var(--run-1)" in chart and "var(--run-2)" in chart for chart in charts)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_equal_input_gives_equal_bytes(runs: list[Path], tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        compare_runs(runs, tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_best_is_marked_and_a_tie_is_not() -> None:
    rows = {
        row["name"]: row["cells"] for row in tables.scalars([report("a", 28, 0.202, 0.9), report("b", 14, 0.21, 0.9)])
    }
    best = {name: [cell["best"] for cell in cells] for name, cells in rows.items()}
    assert best["Held-out loss"] == [True, False] and best["Cached scalars per token per layer"] == [False, True]
    assert best["Digits recognized at 8× length"] == [False, False]
    assert rows["Cached scalars per token per layer"][0]["change"] == ""


def test_no_loss_is_the_best_where_the_teachers_differ() -> None:
    reports = [report("a", 28, 0.202, 0.9), report("b", 14, 0.21, 0.95)]
    reports[1]["teacher_loss"] = 0.3
    rows = {row["name"]: any(cell["best"] for cell in row["cells"]) for row in tables.scalars(reports)}
    assert [name for name in rows if "oss" in name and rows[name]] == [] and len(rows) > 4
    assert rows["Cached scalars per token per layer"] and rows["Digits recognized at 8× length"]


def test_an_interval_is_apart_only_where_nothing_is_shared() -> None:
    (table,) = tables.bench_tables([bench(0.96), bench(0.93), bench(0.7), None])
    [row] = [row for row in table["rows"] if row["name"] == "Frames that show the prompted digit"]
    assert [cell["apart"] for cell in row["cells"]] == [False, False, False, False, True, False]
    assert row["cells"][-1]["mean"] == "–"


def test_what_cannot_be_compared_is_said() -> None:
    one = report("a", 28, 0.202, 0.9)
    assert tables.warnings([one, one]) == []
    other = copy.deepcopy(one) | {"source": "zoo:natural", "teacher_loss": 0.3}
    other["digits_bench"]["prompts"] = 72
    said = " ".join(tables.warnings([one, other]))
    assert "zoo:digits, zoo:natural" in said and "not the same in all runs" in said
    assert "24 prompts x 1 seeds, 72 prompts x 1 seeds" in said


@pytest.mark.parametrize("key", sorted(report("a", 28, 0.2, 0.9)))
def test_a_run_that_lacks_something_still_compares(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mla_convert.evaluate import compare, compare_figures

    for name in ("heldout_loss", "training_loss", "error_by_layer", "error_by_timestep", "recognition_by_frame"):
        monkeypatch.setattr(compare_figures, name, lambda *_: "<svg></svg>")
    whole = report("a", 28, 0.202, 0.9)
    without = {name: value for name, value in whole.items() if name != key}
    for pair in ([whole, without], [without, whole], [without, without], [{key: whole[key]}, {}]):
        runs = [compare.Run(str(number), ".", one) for number, one in enumerate(pair)]
        assert "</html>" in compare.render_comparison(runs)


def test_runs_of_one_name_are_called_by_their_folders(runs: list[Path], tmp_path: Path) -> None:
    for folder in runs:
        (folder / "report.json").write_text(json.dumps({"name": "demo"}))
    assert [run.name for run in compare_runs(runs, tmp_path / "c.html")] == ["wide", "narrow"]
    with pytest.raises(UsageError, match="given twice"):
        compare_runs([runs[0], runs[0]], tmp_path / "c.html")


def test_errors_are_one_line_that_names_the_folder(runs: list[Path], tmp_path: Path) -> None:
    empty, page = tmp_path / "empty", tmp_path / "c.html"
    empty.mkdir()
    with pytest.raises(UserError, match=r"empty has no report\.json; finish the run"):
        compare_runs([runs[0], empty], page)
    with pytest.raises(UserError, match="nowhere is not a folder"):
        compare_runs([runs[0], tmp_path / "nowhere"], page)
    (empty / "report.json").write_text("{")
    with pytest.raises(UserError, match=r"report\.json cannot be read"):
        compare_runs([runs[0], empty], page)
    with pytest.raises(UsageError, match="takes 2 to 6 runs, not 1"):
        compare_runs(runs[:1], page)
    with pytest.raises(UsageError, match=r"ends in \.html"):
        compare_runs(runs, tmp_path / "c.pdf")
    assert not page.exists()


def test_the_command(runs: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "c.html"
    assert main(["compare", *map(str, runs), "--out", str(page), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {
        "report": str(page),
        "runs": {"wide": str(runs[0]), "narrow": str(runs[1])},
    }
    assert main(["compare", str(runs[0]), str(tmp_path)]) == 1
    assert capfd.readouterr().err.strip().count("\n") == 0
