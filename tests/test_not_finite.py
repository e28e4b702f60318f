"""A measurement that is not finite is null in the report and named there; it ends neither a run nor `evaluate`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from recipe_case import write_recipe, write_teacher

from mla_convert.cli import main
from mla_convert.evaluate.video_metrics import frechet_distance
from mla_convert.pipeline import evaluation, steps


def poisoned(evaluate):
    """`evaluate` with a student that has a NaN weight."""

    def measured(student, *inputs):
        with torch.no_grad():
            student.proj_out.bias[0] = float("nan")
        return evaluate(student, *inputs)

    return measured


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    return write_recipe(folder / "pico.yaml", write_teacher(folder / "teacher"))


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """A run whose students get a NaN weight while they are measured."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "evaluate", poisoned(steps.evaluate))
        assert main(["run", str(recipe), "--out", str(folder)]) == 0
    return folder


def test_a_run_gets_to_its_report(finished):
    report = json.loads((finished / "report.json").read_text())
    lost = ["student_loss", "converted_loss", "loss_increase", "velocity_rel_error"]
    assert [report[key] for key in lost] == [None] * 4
    assert report["teacher_loss"] > 0
    assert {*lost, "by_clip.median", "digits_bench.lengths.1x.student.frechet_distance.mean"} <= {*report["not_finite"]}
    assert "velocity_rel_error" in (finished / "report.html").read_text()


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_run_prints_what_it_has(capsys, recipe, finished, options):
    assert main(["run", str(recipe), "--out", str(finished), "--resume", *options]) == 0
    out = capsys.readouterr().out
    if options:
        result = json.loads(out)
        assert "student_loss" not in result and "student_loss" in result["not_finite"]
    else:
        assert out.count("not finite") == 4


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_evaluate_prints_what_it_has(capsys, monkeypatch, finished, tmp_path, options):
    monkeypatch.setattr(evaluation, "evaluate", poisoned(evaluation.evaluate))
    arguments = ["evaluate", str(finished), "--out", str(tmp_path), "--clips", "2", "--rollout-prompts", "0"]
    assert main([*arguments, *options]) == 0
    out = capsys.readouterr().out
    if options:
        result = json.loads(out)
        assert result.pop("report") == str(tmp_path / "report.html")
        written = json.loads((tmp_path / "report.json").read_text())
        for clip in written["by_clip"]["worst"]:
            del clip["pictures"]
        assert result == written
        assert result["student_loss"] is None and "student_loss" in result["not_finite"]
    else:
        assert out.count("not finite") == 3


def test_a_distance_to_what_is_not_finite_is_nan():
    features = np.random.default_rng(0).normal(size=(20, 3))
    broken = features.copy()
    broken[3, 1] = np.nan
    assert np.isnan(frechet_distance(features, broken)) and np.isnan(frechet_distance(broken, features))
