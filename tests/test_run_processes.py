"""A run with several processes: where they synchronize, how they end, and what a later run reads."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import re
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from launched import launched
from recipe_case import RECIPE, write_teacher
from test_encode import SIZE, write_video
from test_pipeline import recipe
from wan_pipeline_case import write_wan_pipeline

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


def ended(tmp_path, arguments, failing, patched, action="raise UserError('no space left')", code=1):
    """The error lines of two processes, of which `failing` does `action` in `patched`; no launcher ends the other.

    As where they are on two machines, or started by srun.
    """
    script = tmp_path / "launched.py"
    script.write_text(
        "import importlib, os, signal, sys\n"
        "from mla_convert.errors import UserError\n"
        "from mla_convert.cli import main\n"
        f"module, name = {patched!r}\n"
        "def broken(*given, **settings):\n"
        f"    {action}\n"
        "    return known(*given, **settings)\n"
        "known = getattr(importlib.import_module(module), name)\n"
        f"if os.environ['RANK'] == '{failing}':\n"
        "    setattr(importlib.import_module(module), name, broken)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = launched(2, script, *arguments)
    assert [one.code for one in done] == [code, code], done
    errors = [one.err for one in done]
    lines = [[line for line in error.splitlines() if "rror" in line or "rocess" in line] for error in errors]
    return ["\n".join(found) for found in lines]


FIRST = "the first process of the run failed; see its error message"


@pytest.mark.parametrize(("prompts", "failing"), [(False, 0), (False, 1), (True, 1)])
def test_a_process_that_fails_ends_an_encoding_in_all(tmp_path, tmp_path_factory, prompts, failing):
    pipeline = write_wan_pipeline(tmp_path_factory.mktemp("pipeline"))
    for number in range(3):
        write_video(tmp_path / f"v{number}.mp4").with_suffix(".txt").write_text("a")
    (tmp_path / "lines.txt").write_text("a\nb\nc\n")
    source = ["--prompts", str(tmp_path / "lines.txt")] if prompts else [str(tmp_path), *SIZE]
    arguments = ["encode", *source, "--out", str(tmp_path / "out"), "--components", str(pipeline), "--shard-size", "1"]
    module, name = "mla_convert.distill.encode.", "make_plan" if failing == 0 else "write_embeddings"
    module += "run" if failing == 0 or prompts else "videos"
    first, other = ended(tmp_path, arguments, failing, (module, name))
    assert "no space left" in (other if failing else first)
    assert re.search(r"process 1 of the run failed" if failing else FIRST, first if failing else other)
    assert "Traceback" not in first + other


@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_before_rollouts_ends_all(teacher, tmp_path, failing):
    data = (
        "data:\n  kind: rollouts\n  heldout: 2\n"
        "  rollouts: {clips: 4, num_frames: 3, batch_size: 2, guidance_scale: 1, prompts: [7 moving up]}\n"
    )
    text = RECIPE.format(teacher=teacher).replace("data:\n  kind: digits\n  heldout: 4\n", data)
    assert data in text
    (tmp_path / "recipe.yaml").write_text(text)
    name = "open_folder" if failing == 0 else "write_rollouts"
    arguments = ["run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]
    first, other = ended(tmp_path, arguments, failing, ("mla_convert.pipeline.rollouts", name))
    assert "no space left" in (other if failing else first)
    assert re.search(r"process 1 of the run failed" if failing else FIRST, first if failing else other)
    assert "Traceback" not in first + other


@pytest.mark.parametrize(
    ("signaled", "patched"),
    [(0, ("mla_convert.pipeline.steps", "convert_source")), (1, ("mla_convert.distill.trainer", "learning_rate"))],
)
def test_a_signal_ends_all_processes_and_one_says_so(teacher, tmp_path, signaled, patched):
    """Which comes to the first one while it converts, or to another in a stage."""
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(teacher=teacher))
    arguments = ["run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]
    action = "os.kill(os.getpid(), signal.SIGUSR1)"
    errors = ended(tmp_path, arguments, signaled, patched, action, code=143)
    said = "after step 1, with checkpoint" if signaled else "a signal stopped the run; continue with the same command"
    assert errors[0].count("error:") == 1 and said in errors[0] and errors[1] == ""
    assert (tmp_path / "run" / STOPPED).exists()


def test_what_the_first_process_does_ahead_of_a_collective_ends_the_others(store):
    first, other = Notices(3), Notices(3)
    assert first.led("clips", True, lambda: 7) == 7 and other.led("clips", False, pytest.fail) is None

    def broken():
        raise UserError("no space")

    # The second time is another one.
    with pytest.raises(UserError, match="no space"), first.failing():
        first.led("clips", True, broken)
    with pytest.raises(UserError, match="the first process of the run failed"), other.failing():
        other.led("clips", False, pytest.fail)
    with pytest.raises(UserError, match="the first process of the run failed"):
        waiting.wait_for_files([Path("nowhere")], other)
    Notices(4).check()


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
    monkeypatch.setattr(waiting, "from_main", lambda value: next(runs))

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
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert stale() == "convert" and not weights.exists()


def test_a_stopped_run_is_marked_before_any_process_ends(teacher, tmp_path, monkeypatch, store):
    """A launcher ends the first process with the others; what all of them would say is said by the first one alone."""

    def stopped(*given):
        raise Stopped("stage match_velocity was stopped by a signal after step 3")

    marked, messages, tell = [], [], Notices.tell
    monkeypatch.setattr(waiting, "from_main", lambda value: 7)
    monkeypatch.setattr(
        Notices, "tell", lambda *given: marked.append((tmp_path / "run" / STOPPED).exists()) or tell(*given)
    )
    monkeypatch.setattr(run_module, "steps_of", lambda recipe: [Step("distill", (), stopped, everywhere=True)])
    monkeypatch.setattr(run_module, "_follow", stopped)
    process = threading.local()
    monkeypatch.setattr(run_module, "this_process", lambda: Meetings(not hasattr(process, "other")))

    def other():
        process.other = True
        with pytest.raises(Stopped) as error:
            run(recipe(teacher), tmp_path / "run")
        messages.append(str(error.value))

    follower = threading.Thread(target=other)
    follower.start()
    time.sleep(0.2)
    assert follower.is_alive() and not messages
    with pytest.raises(Stopped, match="after step 3"):
        run(recipe(teacher), tmp_path / "run")
    # The run that began, and the run that stopped.
    assert marked == [False, True]
    follower.join(timeout=60)
    assert messages == [""]
    monkeypatch.setattr(waiting, "from_main", lambda value: 8)
    monkeypatch.setattr(run_module, "steps_of", lambda recipe: [Step("distill", (), lambda context: None)])
    run(recipe(teacher), tmp_path / "run", until="distill")
    assert not (tmp_path / "run" / STOPPED).exists()


def test_a_collective_that_fails_is_explained_by_what_the_first_process_told(teacher, tmp_path, monkeypatch, store):
    def broken(*given):
        raise RuntimeError("Connection closed by peer")

    runs = iter((1, 2))
    monkeypatch.setattr(waiting, "from_main", lambda value: next(runs))
    monkeypatch.setattr(run_module, "this_process", lambda: Meetings(False))
    monkeypatch.setattr(run_module, "_follow", broken)
    with contextlib.suppress(Stopped), Notices(1).failing():
        raise Stopped("a signal stopped the run")
    with pytest.raises(Stopped) as error:
        run(recipe(teacher), tmp_path / "run")
    assert str(error.value) == ""
    # Without a notice the error is its own.
    with pytest.raises(RuntimeError, match="Connection closed"):
        run(recipe(teacher), tmp_path / "run")


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
