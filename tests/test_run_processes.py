"""A run with several processes: where they synchronize, how they end, and what a later run reads."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import threading
import time

import pytest
import torch.distributed as dist
from recipe_case import write_teacher
from test_pipeline import recipe

from mla_convert.distill import waiting
from mla_convert.distill.requests import Stopped
from mla_convert.distill.waiting import Notices
from mla_convert.errors import UserError
from mla_convert.files import write_json
from mla_convert.pipeline import checks, run, rundir, sources
from mla_convert.pipeline.context import Context
from mla_convert.pipeline.rundir import STOPPED
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


@pytest.fixture
def store(monkeypatch):
    """The store of a launch, for a first process and another one in two threads."""
    shared = dist.HashStore()
    monkeypatch.setattr(waiting, "_store", lambda: shared)
    monkeypatch.setattr(waiting, "_get_default_store", lambda: shared)
    monkeypatch.setattr(waiting, "_POLL_SECONDS", 0.01)
    return shared


def followed(folder, steps, other, recipe, run):
    return threading.Thread(target=run_module._follow, args=(recipe, folder, steps, other, Notices(run)))


def test_processes_meet_only_where_all_take_part(teacher, tmp_path, monkeypatch, store):
    first, other = Meetings(True), Meetings(False)
    monkeypatch.setattr(run_module, "this_process", lambda: first)
    run(recipe(teacher), tmp_path / "run")
    # Behind the stage and at the end: a conversion may take longer than a barrier waits.
    assert first.count == 2

    acted, read, own = [], [], run_module.read_state
    stage = Step("stage", (), lambda context: acted.append(context.main), everywhere=True)
    steps = [Step("convert", (), lambda context: acted.append("wrong")), stage]
    (tmp_path / "shared").mkdir()
    first = Notices(7)

    def done(*names: str) -> None:
        content = json.loads((tmp_path / "run" / "state.json").read_text()) | {"steps": dict.fromkeys(names)}
        write_json(tmp_path / "shared" / "state.json", content)
        first.tell(names[-1] if names else "begun", "[]")

    monkeypatch.setattr(run_module, "read_state", lambda *given: read.append(given) or own(*given))
    helper = followed(tmp_path / "shared", steps, other, recipe(teacher), 7)
    helper.start()
    done()
    time.sleep(0.5)
    assert helper.is_alive() and not acted and other.count == 0 and read == []
    done("convert")
    while not acted:
        time.sleep(0.01)
    time.sleep(0.5)
    assert helper.is_alive() and acted == [False] and other.count == 1
    done("convert", "stage")
    helper.join(timeout=60)
    # The state is read when a step is done, not while the others wait.
    assert not helper.is_alive() and other.count == 1 and len(read) == 2


def test_a_process_that_waits_ends_when_the_first_one_fails(teacher, tmp_path, monkeypatch, store):
    """Whether it fails in a step or before; nothing is left for the next run in the folder."""
    first, other = Meetings(True), Meetings(False)
    monkeypatch.setattr(run_module, "this_process", lambda: first)
    runs = iter(range(9))
    monkeypatch.setattr(run_module, "from_main", lambda value: next(runs))

    def failing(context):
        raise UserError("no space")

    monkeypatch.setattr(run_module, "steps_of", lambda recipe: [Step("convert", (), failing)])
    with pytest.raises(UserError, match="no space"):
        run(recipe(teacher), tmp_path / "run")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    with pytest.raises(UserError, match="is not a run folder"):
        run(recipe(teacher), tmp_path / "thesis")
    for number in (0, 1):
        with pytest.raises(UserError, match="the first process of the run failed"):
            run_module._follow(
                recipe(teacher), tmp_path / "run", [Step("convert", (), failing)], other, Notices(number)
            )
    monkeypatch.setattr(run_module, "steps_of", lambda recipe: [Step("convert", (), lambda context: None)])
    run(recipe(teacher), tmp_path / "run", until="convert")
    run_module._follow(recipe(teacher), tmp_path / "run", [Step("convert", (), failing)], other, Notices(2))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["recipe.resolved.yaml", "state.json"]


def test_a_step_that_is_done_is_waited_for_until_this_machine_sees_it(teacher, tmp_path, monkeypatch):
    seen = iter(({}, {}, {"convert": {}}))
    monkeypatch.setattr(run_module, "read_state", lambda *given: {"steps": next(seen)})
    monkeypatch.setattr(run_module.time, "sleep", lambda seconds: None)
    run_module._wait_until_seen(tmp_path, "convert")
    assert next(seen, None) is None


def test_outputs_are_hashed_again_only_if_they_look_changed(teacher, tmp_path, monkeypatch):
    own = recipe(teacher)
    run(own, tmp_path / "run", until="convert")
    hashed, digest = [], rundir.sha256
    monkeypatch.setattr(rundir, "sha256", lambda path: hashed.append(path.name) or digest(path))

    def stale():
        folder = rundir.RunDir(tmp_path / "run", own, resume=True)
        try:
            found = folder.verify(["convert"])
            folder.begin()
            return found
        finally:
            folder.close()

    assert stale() is None and hashed == []
    weights = next((tmp_path / "run" / "stages" / "00-convert").rglob("*.safetensors"))
    os.utime(weights, ns=(1, 1))
    assert stale() is None and hashed == [weights.name]
    assert stale() is None and hashed == [weights.name]
    # As an older version recorded it.
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    count = len(state["steps"]["convert"].pop("files"))
    write_json(tmp_path / "run" / "state.json", state)
    assert stale() is None and len(hashed) == 1 + count
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert stale() == "convert" and not weights.exists()


def test_a_stopped_run_is_marked_before_any_process_ends(teacher, tmp_path, monkeypatch):
    """A launcher ends the first process with the others."""
    marked = []

    class Marked(Meetings):
        def wait_for_everyone(self):
            super().wait_for_everyone()
            marked.append((tmp_path / "run" / STOPPED).exists())

    def stopped(*given):
        raise Stopped("stage match_velocity was stopped by a signal after step 3")

    monkeypatch.setattr(run_module, "steps_of", lambda recipe: [Step("distill", (), stopped, everywhere=True)])
    monkeypatch.setattr(run_module, "_follow", stopped)
    for number, main in enumerate((True, False), 1):
        monkeypatch.setattr(run_module, "this_process", lambda main=main: Marked(main))
        with pytest.raises(Stopped, match="after step 3"):
            run(recipe(teacher), tmp_path / "run")
        assert marked == [True] * number
    monkeypatch.setattr(run_module, "this_process", lambda: Meetings(True))
    monkeypatch.setattr(run_module, "steps_of", lambda recipe: [Step("distill", (), lambda context: None)])
    run(recipe(teacher), tmp_path / "run", until="distill")
    assert not (tmp_path / "run" / STOPPED).exists()


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
