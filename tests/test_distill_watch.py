"""What a stage monitors: spikes, plateaus, distances, the teacher's loss, previews, trackers."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import logging
import math
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import distill_case as case
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mla_convert.distill.keys import SpikeConfig, StopConfig
from mla_convert.distill.metrics import Metrics
from mla_convert.distill.objective import flow_loss
from mla_convert.distill.schedule import learning_rate
from mla_convert.distill.trainer import run_stage
from mla_convert.distill.watch import Watch, relative_distance
from mla_convert.errors import UsageError, UserError
from mla_convert.pipeline.preview import as_strip, preview_strip
from mla_convert.recipe.schema import validate
from mla_convert.run.stream import stream_chunks

SPIKE = {"factor": 4.0, "window": 3}
LOUD = 7  # the step whose clips are far too loud


class LoudClips(case.Clips):
    """Digits that are ten times as bright in step `LOUD`."""

    def example(self, index):
        clip = super().example(index)
        return {**clip, "latents": clip["latents"] * (10.0 if index // 2 == LOUD - 1 else 1.0)}


def run(folder, data=None, picture=None, **changes):
    teacher = case.tiny_model()
    student = case.perturbed(teacher)
    data = data or case.Clips()
    config = case.make_config(**changes)
    result = run_stage(config, student, {"teacher": teacher}, data, case.Clips().heldout(), folder, 0, 0, None, picture)
    return result, student, Metrics(folder / "metrics.jsonl").rows()


def test_a_spike_is_told_from_noise():
    watch = Watch(SpikeConfig(**SPIKE), None)
    assert [watch.spike_of("student", loss) for loss in (9.0, 1.0, 1.1)] == [None] * 3
    assert watch.spike_of("student", 4.4) is None
    assert watch.spike_of("student", 4.5) == pytest.approx(4.5 / 1.1)
    # A level that stays becomes the median, of each network for itself.
    assert [watch.spike_of("student", 20.0) for _ in range(3)] == [20 / 4.4, 20 / 4.5, None]
    assert watch.spike_of("fake_score", 50.0) is None
    assert Watch(None, None).spike_of("student", 1e9) is None
    again = Watch(SpikeConfig(**SPIKE), None)
    again.load(watch.state())
    assert again.state() == watch.state()


def test_a_plateau_is_told_from_progress():
    watch = Watch(None, StopConfig(patience=2, min_delta=0.1))
    for loss, plateau in ((1.0, False), (0.95, False), (0.85, False), (0.8, False), (0.77, True)):
        watch.heldout(loss)
        assert watch.plateau is plateau


def test_a_spike_is_logged(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        _, _, rows = run(tmp_path, LoudClips(), spike=SPIKE, teacher_weight=0.0)
    assert [row["step"] for row in rows if "spike" in row] == [LOUD]
    assert f"times the median of the last 3 losses, at step {LOUD}" in caplog.text


def test_a_spike_is_skipped(tmp_path):
    """The step changes neither weights nor average nor optimizer, also after a resume."""
    changes = {
        "teacher_weight": 0.0,
        "spike": {**SPIKE, "action": "skip"},
        "checkpoint_every": 1,
        "keep_checkpoints": 9,
    }
    _, student, rows = run(tmp_path / "whole", LoudClips(), **changes)
    assert [row["step"] for row in rows if row.get("skipped")] == [LOUD]
    folders = [tmp_path / "whole" / "checkpoints" / f"step-{step:08d}" for step in (LOUD - 1, LOUD)]
    for name in ("student.safetensors", "ema.safetensors"):
        before, after = ((folder / name).read_bytes() for folder in folders)
        assert before == after
    before, after = (torch.load(folder / "optimizer.pt")["optimizer"]["state"] for folder in folders)
    assert all(torch.equal(after[index][key], tensor) for index in before for key, tensor in before[index].items())

    class Cut(LoudClips):
        def example(self, index):
            if index // 2 >= LOUD - 2:
                raise case.Killed
            return super().example(index)

    with pytest.raises(case.Killed):
        run(tmp_path / "resumed", Cut(), **changes)
    _, resumed, _ = run(tmp_path / "resumed", LoudClips(), **changes)
    assert case.outputs(tmp_path / "resumed") == case.outputs(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), resumed.parameters(), strict=True))


def test_a_spike_ends_the_run(tmp_path):
    with pytest.raises(UserError, match=r"diverged: loss is .*, .* times the median .* at step 7; the last .*00006;"):
        run(tmp_path, LoudClips(), spike={**SPIKE, "action": "stop"}, teacher_weight=0.0)
    assert not (tmp_path / "checkpoints" / "step-00000008").exists()


def test_a_plateau_ends_the_stage(tmp_path):
    """It ends with a checkpoint and trains no further when it is run again; a kill in between changes nothing."""
    changes = {"steps": 40, "eval_every": 2, "stop": {"patience": 2, "min_delta": 0.5}, "schedule": "constant"}
    result, student, rows = run(tmp_path / "whole", **changes)
    assert 4 <= result.steps < 40
    assert rows[-1]["step"] == result.steps
    assert result.heldout_loss == rows[-1]["heldout_loss"]
    again, same, _ = run(tmp_path / "whole", case.Clips(-1), **changes)
    assert (again.steps, again.resumed_from) == (result.steps, result.steps)
    with pytest.raises(case.Killed):
        run(tmp_path / "resumed", case.Clips(7), **changes)
    run(tmp_path / "resumed", **changes)
    assert case.outputs(tmp_path / "resumed") == case.outputs(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), same.parameters(), strict=True))


def test_the_teacher_and_the_average_are_measured(tmp_path):
    _, _, rows = run(tmp_path)
    teacher_loss = flow_loss(case.tiny_model(), case.Clips().heldout())
    # Observed: 0.
    assert rows[0]["teacher_heldout_loss"] == pytest.approx(teacher_loss, rel=1e-5)
    for row in rows:
        assert ("heldout_ratio" in row) == ("heldout_loss" in row)
        if "heldout_loss" in row:
            assert row["heldout_ratio"] == row["heldout_loss"] / rows[0]["teacher_heldout_loss"]
    # Eight steps, with an evaluation every four.
    assert [row["step"] for row in rows if "ema_distance" in row] == [4, 8]
    assert all(0 < row["ema_distance"] < 1 for row in (rows[4], rows[8]))
    assert all(row["grad_norm"] > 0 for row in rows[1:])


def test_relative_distance():
    one, other = (
        {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])},
        {"a": torch.tensor([0.0]), "b": torch.tensor([0.0])},
    )
    assert relative_distance(one, other) == pytest.approx(1)
    assert relative_distance(one, {**one, "a": torch.tensor([2.0])}) == pytest.approx(0.2)


def test_a_preview_is_written_and_shown(tmp_path):
    preview = {"every": 3, "clips": 2, "num_frames": 6, "num_inference_steps": 2}
    _, student, _ = run(tmp_path / "with", picture=preview_strip, preview=preview, tracker="tensorboard")
    pictures = sorted(path.name for path in (tmp_path / "with" / "previews").iterdir())
    assert pictures == ["step-00000003.png", "step-00000006.png", "step-00000008.png"]
    shown = Image.open(tmp_path / "with" / "previews" / "step-00000008.png")
    # Six frames of 16 pixels, four times enlarged, in two rows with gaps of two.
    assert shown.size == (6 * 64 + 5 * 2, 2 * 64 + 2)
    config = case.make_config(preview=preview).preview
    expected = preview_strip(student, config, case.Clips().heldout())
    assert np.abs(np.asarray(shown).astype(int) - expected.astype(int)).max() <= 1
    events = EventAccumulator(str(tmp_path / "with" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("preview")] == [3, 6, 8]
    _, without, _ = run(tmp_path / "without")
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), without.parameters(), strict=True))


def test_a_preview_samples_as_the_stage_trains():
    student, clips = case.tiny_model(), case.Clips().heldout()
    few = {"every": 3, "clips": 1, "num_frames": 4, "sampler": "renoise", "denoising_steps": [1000, 500]}
    strips = [
        preview_strip(student, case.make_config(preview=few | changes).preview, clips)
        for changes in ({}, {"sampler": "euler"}, {"denoising_steps": [1000, 250]})
    ]
    assert not np.array_equal(strips[0], strips[1]) and not np.array_equal(strips[0], strips[2])
    rolled = stream_chunks(
        student, clips["encoder_hidden_states"][:1], 4, 16, 16, sampler="renoise", denoising_steps=(1000, 500)
    )
    assert np.array_equal(strips[0], as_strip(torch.cat(list(rolled), dim=2)))


@pytest.mark.parametrize("channels", [1, 2, 3, 16])
def test_strips_show_any_latent(channels):
    strip = as_strip(torch.full((1, channels, 20, 4, 4), float("nan")))
    assert strip.shape == (64, 16 * 64 + 15 * 2, 3)


def test_a_preview_needs_a_window(tmp_path):
    student = case.tiny_model()
    student.causal = student.causal.model_copy(update={"window_frames": None})
    config = case.make_config(preview={"every": 1}, teacher_weight=0)
    with pytest.raises(UserError, match=r"preview needs a finite window; set causal\.window_frames"):
        run_stage(config, student, {}, case.Clips(), None, tmp_path, 0, 0)


TRACKED = """
import contextlib, sys, time
from pathlib import Path
import distill_case as case

folder, name = Path(sys.argv[1], "training", "01-match_velocity"), sys.argv[2]
with contextlib.suppress(case.Killed):
    case.train(folder, 9, tracker=name)
# wandb names its folders by the second.
time.sleep(1.1)
for resumed_from in (3, 8):
    assert case.train(folder, tracker=name)[0].resumed_from == resumed_from
"""


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_by_name_go_on_with_a_run(tmp_path, name):
    """Killed, resumed, and run once more with nothing left to do. The packages are not dependencies."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs the package {name}, which is not a dependency")
    folder = tmp_path / "run"
    environment = {**case.environment(), "TRACKIO_DIR": str(tmp_path / "trackio"), "WANDB_MODE": "offline"}
    environment["PYTHONPATH"] += f"{os.pathsep}{Path(__file__).parent}"
    command = [sys.executable, "-c", TRACKED, str(folder), name]
    done = subprocess.run(command, env=environment, check=True, timeout=300, stdout=subprocess.PIPE)
    assert done.stdout == b""
    if name == "wandb":
        runs = list(folder.glob("training/*/wandb/offline-run-*"))
        assert len(runs) == 2 and len({run.name.rpartition("-")[2] for run in runs}) == 1
    else:
        with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "mla-convert.db")) as database:
            rows = database.execute("select run_name, step from metrics").fetchall()
        assert {run for run, _ in rows} == {"run-01-match_velocity"}
        assert {step for _, step in rows} == set(range(9))


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "trackio" else found(name))
    with pytest.raises(UserError, match="tracker: trackio needs the package trackio, which is not installed; pip"):
        run(tmp_path, tracker=["tensorboard", "trackio"])
    assert list(tmp_path.iterdir()) == []


def test_schedules_fall_to_the_minimum():
    for schedule in ("linear", "cosine"):
        config = case.make_config(steps=10, warmup_steps=2, schedule=schedule, min_learning_rate=1e-3)
        rates = [learning_rate(config, step) for step in range(11)]
        assert rates[:3] == pytest.approx([1.5e-3, 3e-3, 3e-3])
        assert rates[6] == pytest.approx(2e-3)
        assert rates[10] == pytest.approx(1e-3)
        assert all(a >= b for a, b in itertools.pairwise(rates[2:]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop": {"patience": 2}, "eval_every": None}, "stop needs a held-out loss every few steps; set eval_every"),
        ({"trainable": "all", "lora": {"rank": 2, "alpha": 2}}, "trainable: all freezes none"),
        ({"min_learning_rate": 1.0}, "min_learning_rate is above learning_rate"),
        ({"spike": {"action": "panic"}}, "expected 'warn', 'skip' or 'stop'"),
        ({"tracker": "wandbb"}, "expected"),
    ],
)
def test_keys_that_do_not_fit(changes, message):
    kind = type(case.make_config())
    with pytest.raises(UsageError, match=message):
        validate(kind, {"stage": "match_velocity", "steps": 4, "learning_rate": 1e-3, **changes})


def test_adafactor(tmp_path):
    """A different optimizer trains, saves its state without a second copy of the weights, and resumes."""
    changes = {"optimizer": "adafactor", "learning_rate": 1e-2}
    _, _, rows = run(tmp_path / "whole", **changes)
    assert rows[-1]["teacher_loss"] < rows[1]["teacher_loss"]
    assert all(math.isfinite(row["loss"]) for row in rows[1:])
    with pytest.raises(case.Killed):
        run(tmp_path / "resumed", case.Clips(9), **changes)
    run(tmp_path / "resumed", **changes)
    assert case.outputs(tmp_path / "resumed") == case.outputs(tmp_path / "whole")
    folder = tmp_path / "whole" / "checkpoints" / "step-00000008"
    assert (folder / "optimizer.pt").stat().st_size < (folder / "student.safetensors").stat().st_size
