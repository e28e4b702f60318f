"""What `generate`, `evaluate` and `export` take for a model, and what `export` replaces."""

from __future__ import annotations

import copy
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from recipe_case import digests, write_recipe, write_teacher

from mla_convert.cli import main
from mla_convert.export.same_run import of_same_run
from mla_convert.recipe.load import apply_override

GENERATE = ["--prompt", "7", "--frames", "4", "--steps", "1", "-o", "x.mp4"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the conversions `one` and `two` of a teacher, which differ in their seed."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = str(write_recipe(folder / "pico.yaml", write_teacher(folder / "teacher")))
    for name, seed in (("one", 0), ("two", 1)):
        assert main(["convert", recipe, "--out", str(folder / name), "--set", f"seed={seed}"]) == 0
        (folder / name / "stages" / "00-convert").rename(folder / f"{name}-model")
    return folder


def call(capsys: Any, *arguments: object) -> tuple[int, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr().err


def test_generate_takes_the_teachers_of_this_package(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(capsys, "generate", "zoo:digits", *GENERATE)[0] == 0
    assert (tmp_path / "x.mp4").stat().st_size > 500
    code, err = call(capsys, "generate", "zoo:digts", *GENERATE)
    assert (code, err) == (1, "error: there is no model zoo:digts in this package; it has zoo:digits, zoo:natural\n")


@pytest.mark.parametrize("command", [["generate", "me/model", *GENERATE], ["evaluate", "me/model"]])
def test_a_model_on_the_hub_has_to_be_downloaded(capsys: Any, command: list[str], tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    code, err = call(capsys, *command)
    assert code == 1
    assert err == (
        "error: me/model does not exist; a model on the Hub must be downloaded first: "
        "hf download me/model --local-dir DIR\n"
    )


def test_a_folder_beside_others_is_no_model_on_the_hub(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert call(capsys, "generate", "runs/smal", *GENERATE) == (1, "error: runs/smal does not exist\n")


def test_the_teachers_of_this_package_are_no_conversions(capsys: Any, tmp_path: Path) -> None:
    assert "zoo:digits is a dense model, and evaluate compares" in call(capsys, "evaluate", "zoo:digits")[1]
    code, err = call(capsys, "export", "zoo:digits", tmp_path / "out")
    assert code == 1 and "zoo:digits has no mla_convert.json; export a checkpoint that `mla-convert run`" in err


def test_export_replaces_its_own_and_no_other(capsys: Any, runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call(capsys, "export", runs / "one-model", out)[0] == 0
    assert call(capsys, "export", runs / "one-model", out, "--dtype", "float32")[0] == 0
    assert json.loads((out / "transformer" / "config.json").read_text())["_class_name"] == "MLAWanTransformer3DModel"
    before = digests(out)

    # As after a resume with other samples and another pace of checkpoints.
    manifest = json.loads((out / "mla_convert.json").read_text())
    manifest["recipe"] = {**(manifest["recipe"] or {}), "generate": {"num_frames": 6}}
    (out / "mla_convert.json").write_text(json.dumps(manifest))
    assert call(capsys, "export", runs / "one-model", out, "--dtype", "float32")[0] == 0

    code, err = call(capsys, "export", runs / "two-model", out)
    assert code == 1 and f"{out} holds a checkpoint of another run; choose another folder, or --force" in err
    assert digests(out) == before

    assert call(capsys, "export", runs / "two-model", out, "--force")[0] == 0
    assert digests(out) != before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert call(capsys, "export", runs / "two-model", tmp_path / "other", "--force")[0] == 1


def test_export_shows_no_bar_of_diffusers(capsys: Any, runs: Path, tmp_path: Path) -> None:
    code, err = call(capsys, "export", runs / "one-model", tmp_path / "out", "--max-shard-size", "5KB")
    assert code == 0 and "shards" not in err
    assert len(list((tmp_path / "out" / "transformer").glob("*.safetensors"))) > 1


def test_a_closed_stdout_is_said_before_anything_runs(monkeypatch: Any, tmp_path: Path) -> None:
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "stdout", None)
    for options in (["--json"], []):
        assert main(["recipes", "copy", "demo", str(tmp_path / "x.yaml"), *options]) == 1
    assert err.getvalue().count("error: stdout is closed") == 2
    assert list(tmp_path.iterdir()) == []


def test_a_closed_stderr_ends_nothing(monkeypatch: Any) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["recipes", "list", "--json"]) == 0
    assert "demo" in out.getvalue()
    assert main(["recipes", "show", "nothing-like-it"]) == 2


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("data.folder", "b", False),
        ("data.skip", {"a.safetensors": [1]}, True),
        ("real_score", {"model": "b"}, False),
        ("distill.0.steps", 2, False),
        ("distill.0.checkpoint_every", 2, True),
        ("generate.fps", 8, True),
    ],
)
def test_what_decides_the_weights_makes_another_run(key: str, value: Any, same: bool) -> None:
    stage = {"stage": "match_velocity", "steps": 1, "checkpoint_every": 1}
    recipe = {"data": {"folder": "a", "skip": {}}, "distill": [stage], "generate": {"fps": 16}}
    changed = copy.deepcopy(recipe)
    apply_override(changed, f"{key}={json.dumps(value)}")
    assert changed != recipe and of_same_run({"recipe": recipe}, {"recipe": changed}) == same
