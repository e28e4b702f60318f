"""Runs a recipe from its source to its report, or part of it, and resumes after an interruption."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from rich.console import Console

from ..devices import has_gpu
from ..distill.launch import world_size
from ..distill.progress import leave_to_the_first, progress_bars
from ..distill.requests import Stopped, stopping_at_once
from ..distill.waiting import Notices
from ..errors import UsageError
from ..recipe.schema import Recipe
from .checks import check_inputs
from .context import STAGES, Context, stage_names
from .fits import warn_of_memory, warn_of_samples
from .rundir import RunDir, read_state
from .samples import make_samples
from .steps import Step, steps_of

_TIMEOUT = timedelta(hours=1)
# Seconds until every machine sees what the first process wrote to a shared file system.
_SEEN_WITHIN = 60.0
_BEGUN = "begun"


@dataclass(frozen=True)
class RunResult:
    """The result of a run in the folder `path`.

    `model` is the folder of the last model that was written, `seconds` the wall-clock time of each step so far.
    `main` is False in every process of a distributed run but the first.
    """

    path: Path
    model: Path
    seconds: dict[str, float]
    main: bool


def run(
    recipe: Recipe, path: Path, resume: bool = False, until: str | None = None, console: Console | None = None
) -> RunResult:
    """Run the steps of `recipe` that are not done yet in the run folder `path`.

    `until` is the first word of the last step to run, such as `convert` or `distill`. In a distributed
    run every process calls this; the first one alone does everything but training and rollouts for data.
    Raises UserError in one line, which leaves finished steps in place; UsageError for a recipe with
    several experts (use `run_experts`). A signal raises Stopped, which leaves a mark in the folder: at the end of a
    step of training, or at once where no stage trains.
    """
    if recipe.experts is not None:
        raise UsageError(f"recipe {recipe.name} converts several models; choose --expert {' or '.join(recipe.experts)}")
    processes = this_process()
    steps = steps_until(recipe, until)
    model = path / STAGES / stage_names(recipe)[sum(step.trains for step in steps)]
    notices = Notices.of_run()
    with notices.failing():
        if not processes.is_main_process:
            try:
                with stopping_at_once(main=False):
                    _follow(recipe, path, steps, processes, notices)
                    processes.wait_for_everyone()
            except Stopped:
                # A launcher ends all processes once one has ended, and the first one has still to mark the folder.
                notices.wait_for_end()
                raise Stopped from None
            except RuntimeError:
                # A collective fails once a process has left it; what that one has told says more.
                notices.check()
                raise
            return RunResult(path, model, {}, main=False)
        folder = RunDir(path, recipe, resume)
        try:
            with stopping_at_once(main=True):
                console = console or Console(stderr=True)
                if resume and not folder.begun:
                    _say(console, f"nothing to resume in {path}; starting the run")
                _lead(recipe, folder, steps, processes, console, notices)
                if until is None:
                    folder.mark_finished()
                # The last notice is read while its store exists, which may end with this process.
                processes.wait_for_everyone()
            return RunResult(path, model, folder.seconds, main=True)
        except Stopped:
            folder.mark_stopped()
            raise
        finally:
            folder.close()


def this_process() -> PartialState:
    """Accelerate's state of this process, on the CPU where there is no GPU. Only the first shows notes and bars.

    Collectives time out after an hour instead of NCCL's ten minutes, because the first process also computes
    held-out losses, generates previews and writes checkpoints while the others wait.
    """
    # Unless it is told, Accelerate runs several processes on no CPU, and takes Apple's MPS.
    must_be_told = world_size() > 1 or torch.accelerator.is_available()
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or (must_be_told and not has_gpu())
    processes = PartialState(cpu=on_cpu, timeout=_TIMEOUT)
    if not processes.is_main_process:
        leave_to_the_first()
    return processes


def _lead(
    recipe: Recipe, folder: RunDir, steps: list[Step], processes: PartialState, console: Console, notices: Notices
) -> None:
    """In the first process: check the inputs, run every step that is not done, and record it."""
    if folder.changed:
        _say(console, f"the recipe has changed since the run began: {'; '.join(map(str, folder.changed))}")
    stale = folder.verify(step.name for step in steps_of(recipe))
    if stale:
        _say(console, f"the output of step {stale} is missing or has changed; the step runs again")
    pending = [step for step in steps if not folder.is_done(step.name)]
    for step in steps:
        if step not in pending:
            _discard_scratch(folder, step)
    if not pending:
        _begin(folder, notices)
        return
    if folder.begun:
        _say(console, f"resuming: step {pending[0].name}")
    with progress_bars(console) as report:
        context = Context(recipe, folder.path, report, notices=notices)
        check_inputs(context, pending, folder.finished)
        stages = tuple(recipe.distill[step.stage] for step in pending if step.stage is not None)
        if stages:
            warn_of_memory(recipe.model_copy(update={"distill": stages}), context.device)
        if any(step.action is make_samples for step in pending):
            warn_of_samples(context)
        _begin(folder, notices)
        context.keep_index()
        for step in pending:
            context.seconds, context.outputs = folder.seconds, folder.outputs
            started = time.monotonic()
            step.action(context)
            if step.everywhere:
                processes.wait_for_everyone()
            clips = context.data.identity if step.reads_clips else None
            folder.mark_done(step.name, step.paths, time.monotonic() - started, clips)
            notices.tell(step.name)
            _discard_scratch(folder, step)


def _begin(folder: RunDir, notices: Notices) -> None:
    """Record that the run goes on, and tell the other processes which steps are done."""
    folder.begin()
    notices.tell(_BEGUN, json.dumps(list(folder.seconds)))


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, markup=False, highlight=False)


def _discard_scratch(folder: RunDir, step: Step) -> None:
    if step.scratch is not None:
        shutil.rmtree(folder.path / step.scratch, ignore_errors=True)


def _follow(recipe: Recipe, path: Path, steps: list[Step], processes: PartialState, notices: Notices) -> None:
    """In the other processes: take part in steps that run everywhere, and wait for the rest.

    They poll for notices, because what the first process does alone may outlast the timeout of a barrier.
    """
    done = json.loads(notices.wait(_BEGUN))
    context = Context(recipe, path, lambda *args: None, main=False, notices=notices)
    for step in steps:
        if step.name not in done:
            if step.everywhere:
                step.action(context)
                processes.wait_for_everyone()
            notices.wait(step.name)
            _wait_until_seen(path, step.name)


def _wait_until_seen(path: Path, step: str) -> None:
    """Return when a step that is done is so in this machine's view of the run folder, after a minute at the latest."""
    end = time.monotonic() + _SEEN_WITHIN
    while step not in read_state(path, _SEEN_WITHIN)["steps"] and time.monotonic() < end:
        time.sleep(1)


def steps_until(recipe: Recipe, until: str | None) -> list[Step]:
    """The steps of a recipe up to and including the last whose first word is `until`; all of them if it is None.

    If no step has that name (`distill` without stages), the conversion is the last one.
    """
    steps = steps_of(recipe)
    if until is None:
        return steps
    words = [step.name.split()[0] for step in steps]
    last = until if until in words else "convert"
    return steps[: len(words) - words[::-1].index(last)]
