"""A stage that uses no teacher does not keep one: the first process loads it once, measures it and drops it."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import distill_case as case
import pytest
from recipe_case import RECIPE, write_teacher

from mla_convert.distill.heldout import HeldOut
from mla_convert.distill.metrics import Metrics
from mla_convert.distill.trainer import run_stage
from mla_convert.load import load_dense
from mla_convert.pipeline import run
from mla_convert.pipeline.context import Context
from mla_convert.recipe.load import parse_recipe

STAGE = "{stage: teacher_forcing, steps: 2, learning_rate: 1e-3, batch_size: 2, trainable: attention, tracker: null}"


def test_a_teacher_is_loaded_once_and_gone_before_the_first_step(tmp_path):
    loaded, alive = [], []

    class Watched(case.Clips):
        def example(self, index):
            alive.extend(model() is not None for model in loaded)
            return super().example(index)

    def load_teacher():
        teacher = case.tiny_model()
        loaded.append(weakref.ref(teacher))
        return teacher

    config, clips = case.make_config("teacher_forcing", steps=2), Watched()
    for _ in range(2):
        given = (config, case.perturbed(case.tiny_model()), {}, clips, clips.heldout(), tmp_path / "loaded", 0, 0)
        run_stage(*given, load_teacher=load_teacher)
    assert len(loaded) == 1
    assert alive and not any(alive)

    teacher = case.tiny_model()
    given = (config, case.perturbed(teacher), {"teacher": teacher}, clips, clips.heldout(), tmp_path / "given", 0, 0)
    run_stage(*given)
    assert case.outputs(tmp_path / "loaded") == case.outputs(tmp_path / "given")
    assert Metrics(tmp_path / "given" / "metrics.jsonl").rows()[0]["teacher_heldout_loss"] > 0


def test_no_other_process_loads_it():
    learner = SimpleNamespace(accelerator=SimpleNamespace(is_main_process=False))
    heldout = HeldOut(
        case.Clips().heldout(), case.make_config(), learner, None, lambda: pytest.fail("loaded"), shared=False
    )
    assert heldout.begin() == {} and heldout.teacher_loss is None


def test_a_run_keeps_the_teacher_only_for_stages_that_use_it(tmp_path, monkeypatch):
    models = []

    def load(source, dtype):
        model = load_dense(source, dtype)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr("mla_convert.pipeline.context.load_dense", load)
    teacher = write_teacher(tmp_path / "teacher")
    recipe = parse_recipe(RECIPE.format(teacher=teacher), [f"distill=[{STAGE}]"])
    run(recipe, tmp_path / "run", until="distill")
    rows = Metrics(tmp_path / "run" / "training" / "01-teacher_forcing" / "metrics.jsonl").rows()
    assert rows[0]["teacher_heldout_loss"] > 0 and len(models) == 1

    using = parse_recipe(RECIPE.format(teacher=teacher)).distill[0]
    other = Context(recipe, tmp_path / "run", lambda *told: None, main=False)
    assert list(other.networks(using)) == ["teacher"] and len(models) == 2
    assert other.networks(recipe.distill[0]) == {}
    other.unload_dense()
    gc.collect()
    assert models[1]() is None and len(models) == 2
