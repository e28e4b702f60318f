"""`mla-convert evaluate` on the command line: which teacher and how many clips."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pico
import pytest
from recipe_case import digests, write_recipe, write_teacher

from mla_convert.cli import main
from mla_convert.export.evidence import find_evidence
from mla_convert.export.run_folder import run_of
from mla_convert.families.wan import CausalWanTransformer3DModel
from mla_convert.pipeline import evaluation


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def finished(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder / "pico.yaml", teacher)
    assert main(["run", str(recipe), "--out", str(folder / "run"), "--set", "distill.0.steps=1"]) == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"num_layers": 3}, "3 layers and not 2"),
        ({"num_attention_heads": 3, "text_dim": 16}, "16 channels of text and not 32, 3 heads and not 2"),
        ({"attention_head_dim": 24}, "24 channels per head and not 12"),
    ],
)
def test_a_teacher_of_another_shape_is_refused_before_any_weights_are_read(
    capsys: Any,
    finished: Path,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: Any,
    changes: dict[str, int],
    difference: str,
) -> None:
    config = CausalWanTransformer3DModel.load_config(teacher)
    CausalWanTransformer3DModel.from_config({**config, **changes}).save_pretrained(tmp_path)
    monkeypatch.setattr(evaluation, "load_checkpoint", lambda *_, **__: pytest.fail("weights were read"))
    capsys.readouterr()
    assert main(["evaluate", str(finished), "--teacher", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert f"has {difference}; give --teacher the dense model" in err and err.count("\n") == 1


def test_the_natural_teacher_is_no_teacher_of_digits(capsys: Any, finished: Path) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(finished), "--teacher", "zoo:natural"]) == 2
    assert "the teacher zoo:natural has " in capsys.readouterr().err


def test_a_model_without_a_manifest_is_refused_before_any_weights_are_read(
    capsys: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    teacher = pico.dense_model(in_channels=4, out_channels=4)
    pico.convert(teacher, init="svd", kv_lora_rank=8).save_pretrained(tmp_path / "model")
    teacher.save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr(evaluation, "load_checkpoint", lambda *_, **__: pytest.fail("weights were read"))
    assert main(["evaluate", str(tmp_path / "model"), "--teacher", str(tmp_path / "teacher")]) == 2
    assert "has no mla_convert.json that names its held-out data" in capsys.readouterr().err


@pytest.mark.parametrize("state", ['{"version": 4, "terraform": []}', "[]", "not JSON"])
def test_the_state_of_another_program_is_not_that_of_a_run(
    capsys: Any, finished: Path, tmp_path: Path, state: str
) -> None:
    mine = tmp_path / "models" / "mine"
    shutil.copytree(finished / "checkpoint", mine)
    for folder in (tmp_path, tmp_path / "models"):
        (folder / "state.json").write_text(state)
    (tmp_path / "models" / "report.json").write_text('{"name": "of another program"}')
    assert mine / "report.json" in find_evidence(mine).files
    assert main(["evaluate", str(mine), "--rollout-prompts", "0", "--clips", "2"]) == 0
    assert (mine / "report.html").is_file()
    capsys.readouterr()


def test_a_model_of_a_stage_is_in_its_run(finished: Path) -> None:
    assert run_of(finished / "checkpoint") == finished == run_of(finished / "stages" / "00-convert")
    assert run_of(finished / "stages") == finished and run_of(finished) is None


def test_what_a_run_has_recorded_of_a_stage_is_not_written_over(capsys: Any, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = digests(run / "stages")
    stage = run / "stages" / "00-convert"
    assert main(["evaluate", str(stage), "--rollout-prompts", "0", "--clips", "2"]) == 0
    assert digests(run / "stages") == before
    assert json.loads((run / "evaluation" / "00-convert" / "report.json").read_text())["clips"] == 2
    # Where a run is only converted, that is the evidence of its stage; else its own.
    assert find_evidence(stage).report == json.loads((stage / "report.json").read_text())
    (stage / "report.json").unlink()
    assert (find_evidence(stage).report or {})["clips"] == 2
    capsys.readouterr()


def test_an_unfinished_run_names_the_checkpoint_that_it_has(
    capsys: Any, finished: Path, teacher: Path, tmp_path: Path
) -> None:
    run, recipe = tmp_path / "run", write_recipe(tmp_path / "pico.yaml", teacher)
    assert main(["convert", str(recipe), "--out", str(run)]) == 0
    stage = run / "stages" / "00-convert"
    generate = ["generate", run, "--prompt", "7", "--out", tmp_path / "x.mp4"]
    for command in (["evaluate", run], ["export", run, tmp_path / "out"], generate):
        capsys.readouterr()
        assert main([str(word) for word in command]) == 1
        err = capsys.readouterr().err
        assert f"continue it with `mla-convert run --out {run} --resume`, or give {stage}\n" in err
    page = str(tmp_path / "page.html")
    assert main(["compare", str(finished), str(run), "--out", page]) == 1
    measured = run / "evaluation" / "00-convert"
    assert f"write one with `evaluate {stage}` and give {measured}\n" in capsys.readouterr().err
    assert main(["evaluate", str(stage), "--rollout-prompts", "0", "--clips", "2"]) == 0
    assert main(["compare", str(finished), str(measured), "--out", page]) == 0
    capsys.readouterr()


def test_fewer_clips_than_asked_for_are_said_and_counted(capsys: Any, finished: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", str(finished), "--out", str(tmp_path), "--rollout-prompts", "0", "--clips"]
    assert main([*arguments, "3", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["clips"] == 3 and "held-out clips" not in err
    # Pictures are in the file alone.
    written = (tmp_path / "report.json").read_text()
    assert "data:image" not in out and '"pictures"' not in out and '"worst"' in out
    assert '"worst"' in written and "data:image" in written

    assert main([*arguments, "99"]) == 0
    out, err = capsys.readouterr()
    assert "held-out loss (4 clips)" in out
    assert err.splitlines().count("measured on all 4 held-out clips, fewer than 99") == 1
    assert json.loads((tmp_path / "report.json").read_text())["clips"] == 4


def test_the_table_of_a_run_counts_its_clips(capsys: Any, finished: Path) -> None:
    capsys.readouterr()
    recipe = finished.parent / "pico.yaml"
    assert main(["run", str(recipe), "--out", str(finished), "--resume", "--set", "distill.0.steps=1"]) == 0
    assert "held-out loss (4 clips)" in capsys.readouterr().out


def test_a_run_goes_on_with_the_recipe_that_it_has_recorded(capsys: Any, finished: Path, tmp_path: Path) -> None:
    """Started with `--set`, which need not be typed again."""
    recipe, state = finished.parent / "pico.yaml", (finished / "state.json").read_text()
    changes = ["--set", "distill.0.learning_rate=2e-3"]
    assert main(["run", str(recipe), "--out", str(finished), "--resume", *changes]) == 2
    err = capsys.readouterr().err
    assert "distill.0.steps was 1 (an integer) and is now 6 (an integer); distill.0.learning_rate was 0.001" in err
    assert f"recorded recipe: `mla-convert run --out {finished} --resume`\n" in err
    assert main(["run", "--out", str(finished), "--resume"]) == 0
    assert (finished / "state.json").read_text() == state
    capsys.readouterr()
    for arguments, message in (
        (["--resume"], "give a RECIPE; only --resume with the --out of a run"),
        (["--out", str(finished)], "give a RECIPE; only --resume with the --out of a run"),
        (["--resume", "--out", str(tmp_path)], f"{tmp_path} has no recipe.resolved.yaml of a run to continue"),
    ):
        assert main(["run", *arguments]) == 2
        assert message in capsys.readouterr().err
