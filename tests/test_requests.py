"""A stage that is asked to stop writes a checkpoint first; with `global_batch`, its processes may change in number."""

from __future__ import annotations

import os
import signal

import distill_case as case
import pytest
import torch
from safetensors.torch import load_file

from mla_convert.distill.launch import check_launch
from mla_convert.distill.metrics import Metrics
from mla_convert.distill.requests import Stopped
from mla_convert.errors import UserError

CLIPS_A_STEP = 2


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_ends_a_stage_after_its_step_with_a_checkpoint(tmp_path, monkeypatch, number):
    before = signal.getsignal(number)
    _, expected = case.train(tmp_path / "whole", checkpoint_every=None)
    example = case.Clips.example

    def asked(self, index):
        if index == 4 * CLIPS_A_STEP:
            os.kill(os.getpid(), number)
        return example(self, index)

    monkeypatch.setattr(case.Clips, "example", asked)
    with pytest.raises(Stopped, match=r"stopped by a signal after step 5, with checkpoint .*step-00000005; .*--resume"):
        case.train(tmp_path / "stopped", checkpoint_every=None)
    assert Stopped.exit_code == 143
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    result, weights = case.train(tmp_path / "stopped", checkpoint_every=None)
    assert result.resumed_from == 5
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    files = [folder / "metrics.jsonl" for folder in (tmp_path / "whole", tmp_path / "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_signal_in_the_last_step_ends_the_stage_too(tmp_path, monkeypatch):
    """The steps after it may take hours, although the stage itself has nothing left to do."""
    example = case.Clips.example

    def asked(self, index):
        if index == 7 * CLIPS_A_STEP:
            os.kill(os.getpid(), signal.SIGUSR1)
        return example(self, index)

    monkeypatch.setattr(case.Clips, "example", asked)
    with pytest.raises(Stopped, match="after step 8"):
        case.train(tmp_path)
    result, _ = case.train(tmp_path, last_clip=-1)
    assert result.resumed_from == result.steps == 8


def test_a_signal_to_one_process_ends_them_all(tmp_path):
    changes = {"steps": 200, "checkpoint_every": None, "eval_every": None}
    assert case.stop_two_processes(tmp_path, 3, **changes) != 0
    (checkpoint,) = (tmp_path / "whole" / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert 3 <= step < 200
    assert Metrics(tmp_path / "whole" / "metrics.jsonl").rows()[-1]["step"] == step


def test_the_clock_asks_for_checkpoints(tmp_path):
    case.train(tmp_path / "often", checkpoint_every=None, checkpoint_minutes=1e-9, keep_checkpoints=20)
    assert len(list((tmp_path / "often" / "checkpoints").iterdir())) == 8
    case.train(tmp_path / "seldom", checkpoint_every=None, checkpoint_minutes=60, keep_checkpoints=20)
    assert len(list((tmp_path / "seldom" / "checkpoints").iterdir())) == 1


def test_a_global_batch_goes_on_with_other_processes(tmp_path):
    """Two processes continue where one stopped, and end as it would have ended."""
    changes = {"batch_size": 1, "global_batch": 4}
    _, expected = case.train(tmp_path / "one", **changes)
    _, spelled = case.train(tmp_path / "spelled", batch_size=1, grad_accumulation=4)
    assert all(torch.equal(spelled[name], tensor) for name, tensor in expected.items())
    with pytest.raises(case.Killed):
        case.train(tmp_path / "whole", last_clip=4 * 4, **changes)
    case.two_processes(tmp_path, 4 * 4, **changes)
    one, two = (load_file(tmp_path / run / "checkpoints/step-00000008/ema.safetensors") for run in ("one", "whole"))
    # Observed: 1.2e-7.
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5


def test_a_global_batch_that_does_not_divide_is_refused(monkeypatch):
    config = case.make_config(batch_size=2, global_batch=64)
    assert config.over(8).grad_accumulation == 4
    monkeypatch.setenv("WORLD_SIZE", "48")
    message = "global_batch 64 is not a multiple of batch_size 2 times 48 processes; change it"
    with pytest.raises(UserError, match=message):
        check_launch(config)
    with pytest.raises(ValueError, match="grad_accumulation follows from global_batch"):
        case.make_config(grad_accumulation=2, global_batch=64)


def test_an_average_without_warm_up_has_its_decay_from_the_second_step(tmp_path):
    changes = {"steps": 3, "checkpoint_every": 1, "keep_checkpoints": 3, "ema_decay": 0.9, "ema_warmup": False}
    case.train(tmp_path, **changes)
    folders = sorted((tmp_path / "checkpoints").iterdir())
    weights, averages = (
        [load_file(folder / f"{name}.safetensors") for folder in folders] for name in ("student", "ema")
    )
    for name, average in averages[2].items():
        assert torch.equal(averages[0][name], weights[0][name])
        expected = 0.9 * averages[1][name] + 0.1 * weights[2][name]
        # Observed: 6e-8.
        assert (average - expected).abs().max() < 1e-6
