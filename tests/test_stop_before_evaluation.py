"""A stage that is to stop leaves the held-out loss and the preview of its last step to the run that resumes it."""

from __future__ import annotations

import itertools
import json
import os
import signal

import distill_case as case
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mla_convert.distill.heldout import HeldOut
from mla_convert.distill.metrics import Metrics
from mla_convert.distill.requests import Requests, Stopped
from mla_convert.distill.trainer import run_stage

CLIPS_A_STEP = 2
PREVIEW = {"every": 4, "clips": 1}


class Asked(case.Clips):
    """Digits, of which the first clip of step `step` asks the stage to stop."""

    def __init__(self, step: int | None = None) -> None:
        super().__init__()
        self.step = step

    def example(self, index):
        if self.step is not None and index == (self.step - 1) * CLIPS_A_STEP:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().example(index)


class Drawn:
    """A stand-in for previews, which depends on the weights and counts its calls."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, student, config, heldout, negative):
        self.count += 1
        mean = float(next(student.parameters()).float().mean())
        return np.full((4, 4, 3), abs(mean) * 1e6 % 256, dtype=np.uint8)


def train(folder, step=None, **changes):
    """Run the stage; returns its result, the weights and how many previews it made."""
    student, clips, drawn = case.perturbed(case.tiny_model()), Asked(step), Drawn()
    config = case.make_config(preview=PREVIEW, **changes)
    networks = {"teacher": case.tiny_model()}
    result = run_stage(config, student, networks, clips, clips.heldout(), folder, 0, 0, picture=drawn)
    return result, student.state_dict(), drawn.count


def outputs(folder):
    pictures = {path.name: path.read_bytes() for path in (folder / "previews").iterdir()}
    return case.outputs(folder) | pictures


def state_of(folder, step):
    return json.loads((folder / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run with a checkpoint after every step: its folder and its weights."""
    folder = tmp_path_factory.mktemp("whole")
    _, weights, count = train(folder, checkpoint_every=1)
    assert count == 2
    return folder, weights


@pytest.mark.parametrize("step", [4, 8])
def test_a_held_out_loss_is_left_to_the_resumed_run(whole, tmp_path, monkeypatch, step):
    measured = []
    measure = HeldOut.measure
    monkeypatch.setattr(HeldOut, "measure", lambda self: measured.append(0) or measure(self))
    with pytest.raises(Stopped, match=f"after step {step}"):
        train(tmp_path, step, checkpoint_every=1, tracker="tensorboard")
    # The first is measured before the first step.
    assert len(measured) == step // 4
    assert state_of(tmp_path, step)["owed"] == "heldout"
    rows = Metrics(tmp_path / "metrics.jsonl").rows()
    assert rows[-1]["step"] == step - 1
    result, weights, _ = train(tmp_path, checkpoint_every=1, tracker="tensorboard")
    assert result.resumed_from == step and len(measured) == 3
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    # Also where the stop came in the last step, after which the resumed run trains no more.
    assert [event.step for event in events.Scalars("heldout_loss")] == [0, 4, 8]
    assert [event.step for event in events.Images("preview")] == [4, 8]
    assert result.heldout_loss == Metrics(tmp_path / "metrics.jsonl").rows()[-1]["heldout_loss"]
    assert outputs(tmp_path) == outputs(whole[0])
    assert all(torch.equal(weights[name], tensor) for name, tensor in whole[1].items())


def test_a_preview_is_left_to_the_resumed_run(whole, tmp_path, monkeypatch):
    """The signal comes during the held-out loss of step 4, which is finished."""
    counted, measure = itertools.count(), HeldOut.measure

    def asked(self):
        if next(counted) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(self)

    with monkeypatch.context() as patch:
        patch.setattr(HeldOut, "measure", asked)
        with pytest.raises(Stopped, match="after step 4"):
            train(tmp_path, checkpoint_every=1)
    assert state_of(tmp_path, 4)["owed"] == "preview" and not (tmp_path / "previews").exists()
    result, _, count = train(tmp_path, checkpoint_every=1)
    assert (result.resumed_from, count) == (4, 2)
    assert outputs(tmp_path) == outputs(whole[0])


def test_what_is_owed_stays_owed_until_a_later_checkpoint(whole, tmp_path):
    """Killed after the owed step was concluded, and before the next checkpoint."""
    with pytest.raises(Stopped):
        train(tmp_path, 4, checkpoint_every=None)
    clips = case.Clips(last=5 * CLIPS_A_STEP)
    config, networks = case.make_config(preview=PREVIEW, checkpoint_every=None), {"teacher": case.tiny_model()}
    with pytest.raises(case.Killed):
        run_stage(
            config,
            case.perturbed(case.tiny_model()),
            networks,
            clips,
            clips.heldout(),
            tmp_path,
            0,
            0,
            picture=Drawn(),
        )
    assert Metrics(tmp_path / "metrics.jsonl").rows()[-1]["step"] == 5
    train(tmp_path, checkpoint_every=None)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole[0] / "metrics.jsonl").read_bytes()


def test_a_plateau_that_is_found_by_the_resumed_run_ends_it(tmp_path):
    changes = {"steps": 40, "eval_every": 2, "stop": {"patience": 2, "min_delta": 0.5}, "schedule": "constant"}
    result, _, _ = train(tmp_path / "whole", **changes)
    assert 4 <= result.steps < 40
    with pytest.raises(Stopped):
        train(tmp_path / "stopped", result.steps, **changes)
    again, _, _ = train(tmp_path / "stopped", **changes)
    assert again.steps == again.resumed_from == result.steps
    assert outputs(tmp_path / "stopped") == outputs(tmp_path / "whole")


def test_other_steps_ask_once(tmp_path, monkeypatch):
    asked = []
    agreed = Requests.agreed
    monkeypatch.setattr(Requests, "agreed", lambda self: asked.append(0) or agreed(self))
    train(tmp_path)
    assert len(asked) == 8 + 2 * 2
