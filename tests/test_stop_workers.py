"""A launcher sends SIGTERM to the whole process group of a run, its data workers included."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from recipe_case import RECIPE, digests, write_teacher
from warm import Python

from mla_convert.distill.requests import leave_signals_to_parent

STAGE = "01-match_velocity"


def distilling(recipe: Path, out: Path) -> Python:
    return Python(
        "-m", "mla_convert", "distill", recipe, "--out", out, "--resume", changes={"ACCELERATE_USE_CPU": "true"}
    )


def trained(out: Path) -> dict[str, str]:
    """Digests of the model that the stage wrote, and of its metrics."""
    found = digests(out / "stages" / STAGE / "transformer") | digests(out / "training" / STAGE)
    assert "metrics.jsonl" in found and len(found) > 2
    return found


def test_a_signal_to_the_group_of_a_run_with_workers_writes_a_checkpoint(tmp_path):
    recipe, whole, stopped = tmp_path / "recipe.yaml", tmp_path / "whole", tmp_path / "stopped"
    text = RECIPE.format(teacher=write_teacher(tmp_path / "teacher"))
    recipe.write_text(text.replace("steps: 6\n", "steps: 80\n    data_workers: 1\n    checkpoint_minutes: null\n"))
    recipe.write_text(recipe.read_text().replace("checkpoint_every: 2", "checkpoint_every: null"))
    metrics = stopped / "training" / STAGE / "metrics.jsonl"
    run = distilling(recipe, stopped)
    try:
        deadline = time.monotonic() + 300
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 4:
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        os.killpg(run.pid, signal.SIGTERM)
        done = run.finish()
    finally:
        run.kill()
    assert done.code == 143
    assert "was stopped by a signal after step" in done.err
    (checkpoint,) = (stopped / "training" / STAGE / "checkpoints").iterdir()
    rows = metrics.read_bytes().count(b"\n") - 1
    assert (stopped / ".stopped").exists()
    assert checkpoint.name == f"step-{rows:08d}" and rows < 80

    for out in (stopped, whole):
        assert distilling(recipe, out).finish().code == 0
    assert trained(stopped) == trained(whole)
    assert not (stopped / ".stopped").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_worker_leaves_signals_to_its_parent(number):
    before = signal.getsignal(number)
    try:
        leave_signals_to_parent(0)
        os.kill(os.getpid(), number)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
