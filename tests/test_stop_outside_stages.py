"""A signal that comes while no stage trains ends a run at once; it leaves the mark, and the run goes on later."""

from __future__ import annotations

import importlib
import json
import os
import signal

import pytest
from recipe_case import write_teacher
from test_pipeline import recipe

from mla_convert.cli.signals import orderly_end
from mla_convert.distill.requests import SIGNALS, Stopped, stopping_at_once
from mla_convert.errors import UserError
from mla_convert.pipeline import run
from mla_convert.pipeline.rundir import STOPPED
from mla_convert.pipeline.steps import Step

run_module = importlib.import_module("mla_convert.pipeline.run")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def signalled(number):
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
            patch.setattr(run_module, moment, signalled(number))
        else:
            patch.setitem(steps, moment, Step(moment, (), signalled(number)))
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


def test_the_other_processes_of_a_launch_leave_it_to_the_first(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = signal.getsignal(signal.SIGTERM)
    with stopping_at_once(main=False):
        os.kill(os.getpid(), signal.SIGUSR1)
        # A launcher sends it where a process has failed.
        assert signal.getsignal(signal.SIGTERM) is before
