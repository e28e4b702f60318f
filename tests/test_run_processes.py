"""A run with several processes: where they synchronize, how they end, and what a later run reads."""

from __future__ import annotations

import dataclasses
import importlib
import json
import threading
import time

import pytest
from recipe_case import write_teacher
from test_pipeline import recipe

from mla_convert.errors import UserError
from mla_convert.files import write_json
from mla_convert.pipeline import checks, run, sources
from mla_convert.pipeline.context import Context
from mla_convert.pipeline.steps import Step, steps_of

run_module = importlib.import_module("mla_convert.pipeline.run")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


class Meetings:
    """A process, the first or another; counts how often it waits for all."""

    def __init__(self, is_main_process: bool) -> None:
        self.is_main_process, self.count = is_main_process, 0

    def wait_for_everyone(self) -> None:
        self.count += 1


def test_processes_meet_only_where_all_take_part(teacher, tmp_path, monkeypatch):
    first, other = Meetings(True), Meetings(False)
    monkeypatch.setattr(run_module, "this_process", lambda: first)
    run(recipe(teacher), tmp_path / "run")
    # At the start and behind the stage: a conversion may take longer than a barrier waits.
    assert first.count == 2

    acted = []
    stage = Step("stage", (), lambda context: acted.append(context.main), everywhere=True)
    steps = [Step("convert", (), lambda context: acted.append("wrong")), stage]
    (tmp_path / "shared").mkdir()

    def done(*names: str) -> None:
        content = json.loads((tmp_path / "run" / "state.json").read_text()) | {"steps": dict.fromkeys(names)}
        write_json(tmp_path / "shared" / "state.json", content)

    done()
    helper = threading.Thread(target=run_module._follow, args=(recipe(teacher), tmp_path / "shared", steps, other))
    helper.start()
    time.sleep(1)
    assert helper.is_alive() and not acted and other.count == 1
    done("convert")
    while not acted:
        time.sleep(0.01)
    time.sleep(1)
    assert helper.is_alive() and acted == [False] and other.count == 2
    done("convert", "stage")
    helper.join(timeout=60)
    assert not helper.is_alive() and other.count == 2


def test_a_process_that_waits_ends_when_the_first_one_fails(teacher, tmp_path, monkeypatch):
    """It is told of the failure until the next run in the folder begins."""
    first, other = Meetings(True), Meetings(False)
    first.num_processes = 2
    monkeypatch.setattr(run_module, "this_process", lambda: first)

    def failing(context):
        raise UserError("no space")

    monkeypatch.setattr(run_module, "steps_of", lambda recipe: [Step("convert", (), failing)])
    with pytest.raises(UserError, match="no space"):
        run(recipe(teacher), tmp_path / "run")
    with pytest.raises(UserError, match="the first process of the run failed"):
        run_module._follow(recipe(teacher), tmp_path / "run", [Step("convert", (), failing)], other)
    monkeypatch.setattr(run_module, "steps_of", lambda recipe: [Step("convert", (), lambda context: None)])
    run(recipe(teacher), tmp_path / "run", until="convert")
    run_module._follow(recipe(teacher), tmp_path / "run", [Step("convert", (), failing)], other)


def test_what_follows_a_conversion_reads_the_commit_that_was_converted(teacher, tmp_path, monkeypatch):
    """The Hub's main branch may have moved on when a run is resumed."""
    asked = []

    def source_of(section, causal):
        asked.append(section.revision)
        return dataclasses.replace(found(section.model_copy(update={"revision": None}), causal), revision="a" * 40)

    found = sources.source_of
    monkeypatch.setattr("mla_convert.pipeline.context.source_of", source_of)
    run(recipe(teacher), tmp_path / "run", until="convert")
    run(recipe(teacher), tmp_path / "run", until="distill", resume=True)
    assert asked == [None, "a" * 40]


def test_a_stage_that_is_done_is_not_asked_of_the_launch(teacher, tmp_path, monkeypatch):
    """It was trained by another launch, such as eight processes where now there are three."""
    two = recipe(teacher, "distill.0.global_batch=2", "distill.0.steps=1", "generate.prompts=[]", "data.heldout=2")
    asked = []

    def check_launch(stage):
        asked.append(stage.stage)
        if len(asked) > 1:
            raise UserError("global_batch 2 is not a multiple of batch_size 2 times 3 processes")

    monkeypatch.setattr(checks, "check_launch", check_launch)
    run(two, tmp_path / "run", until="distill")
    run(two, tmp_path / "run", resume=True)
    assert asked == ["match_velocity"]
    with pytest.raises(UserError, match="global_batch 2 is not a multiple"):
        run(two, tmp_path / "other")
    # Nor are the clips asked for what only a conversion or a stage that is done has read.
    read = []
    monkeypatch.setattr(checks, "_check_data", lambda context, made, read_clips, negative: read.append(negative))
    guided = recipe(teacher, "convert.calibration.empty_prompt_rate=0.5")
    checks.check_inputs(Context(guided, tmp_path, lambda *told: None), [Step("evaluate", (), run, reads_clips=True)])
    checks.check_inputs(Context(guided, tmp_path, lambda *told: None), steps_of(guided)[:1])
    assert read == [False, True]
