"""A signal that comes while no stage trains ends a run at once; it leaves the mark, and the run goes on later."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading

import pytest
from recipe_case import write_teacher
from test_pipeline import recipe

from mla_convert.cli.signals import orderly_end
from mla_convert.distill.requests import SIGNALS, Stopped, stopping_at_once
from mla_convert.distill.snapshots import Snapshots
from mla_convert.errors import UserError
from mla_convert.pipeline import run
from mla_convert.pipeline.rundir import STOPPED
from mla_convert.pipeline.steps import Step

run_module = importlib.import_module("mla_convert.pipeline.run")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def signaled(number):
    def action(*given):
        os.kill(os.getpid(), number)
        pytest.fail("nothing may follow")

    return action


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("moment", ["check_inputs", "convert", "evaluate"])
def test_a_run_is_marked_wherever_a_signal_ends_it(teacher, tmp_path, monkeypatch, number, moment):
    done, before = [], [signal.getsignal(each) for each in SIGNALS]
    steps = {name: Step(name, (), lambda context, name=name: done.append(name)) for name in ("convert", "evaluate")}
    monkeypatch.setattr(run_module, "steps_of", lambda recipe: list(steps.values()))
    with monkeypatch.context() as patch:
        if moment == "check_inputs":
            patch.setattr(run_module, moment, signaled(number))
        else:
            patch.setitem(steps, moment, Step(moment, (), signaled(number)))
        with pytest.raises(Stopped, match="a signal stopped the run; continue with the same command and --resume"):
            run(recipe(teacher), tmp_path / "run")
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert (tmp_path / "run" / STOPPED).exists()
    run(recipe(teacher), tmp_path / "run", resume=True)
    assert done == ["convert", "evaluate"] and not (tmp_path / "run" / STOPPED).exists()
    assert json.loads((tmp_path / "run" / "state.json").read_text())["finished"]


def test_an_error_or_ctrl_c_leaves_no_mark(teacher, tmp_path, monkeypatch):
    for error in (UserError, KeyboardInterrupt):

        def failing(context, error=error):
            raise error("no space")

        monkeypatch.setattr(run_module, "steps_of", lambda recipe, failing=failing: [Step("convert", (), failing)])
        with pytest.raises(error, match="no space"):
            run(recipe(teacher), tmp_path / "run")
        assert not (tmp_path / "run" / STOPPED).exists()


def test_a_second_signal_does_not_disturb_the_end():
    """`timeout` sends two."""

    def terminated():
        with stopping_at_once(main=True):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

    with orderly_end() as received:
        with pytest.raises(Stopped):
            terminated()
        os.kill(os.getpid(), signal.SIGTERM)
    assert received == [signal.SIGTERM]


class Dropping:
    """An object that is collected when a signal comes; Python drops what is raised then."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        os.kill(os.getpid(), self.number)


def dropped(number):
    Dropping(number)
    threading.Event().wait(10)
    pytest.fail("nothing may follow")


def twice(number):
    Dropping(number)
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_whose_exception_is_dropped_is_sent_again(number):
    hook = sys.unraisablehook
    with orderly_end() as received:
        with pytest.raises(Stopped), stopping_at_once(main=True):
            dropped(number)
        assert received == [number]
    with orderly_end() as received:
        with pytest.raises(KeyboardInterrupt):
            dropped(signal.SIGTERM)
        assert received == [signal.SIGTERM]
    assert sys.unraisablehook is hook
    with pytest.raises(Stopped), stopping_at_once(main=True):
        twice(number)
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            # Were it sent again after the block, it would end this process.
            thread.join()


def test_a_signal_during_the_last_checkpoint_of_a_stage_ends_the_run(teacher, tmp_path, monkeypatch):
    save = Snapshots.save

    def signaled(self, row, owed):
        save(self, row, owed)
        os.kill(os.getpid(), signal.SIGUSR1)

    short = recipe(teacher, "distill.0.steps=1", "distill.0.checkpoint_every=null")
    monkeypatch.setattr(Snapshots, "save", signaled)
    with pytest.raises(Stopped, match="a signal stopped the run"):
        run(short, tmp_path / "run", until="distill")
    assert (tmp_path / "run" / STOPPED).exists()
    monkeypatch.undo()
    run(short, tmp_path / "run", resume=True, until="distill")


def test_the_other_processes_of_a_launch_leave_it_to_the_first(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = signal.getsignal(signal.SIGTERM)
    with stopping_at_once(main=False):
        os.kill(os.getpid(), signal.SIGUSR1)
        # A launcher sends it where a process has failed.
        assert signal.getsignal(signal.SIGTERM) is before
