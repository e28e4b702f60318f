"""A stage that was stopped and run again ends with the same bytes."""

from __future__ import annotations

import json
import random
import signal

import distill_case as case
import pytest
import torch
from warm import Python

from mla_convert.distill.metrics import Metrics
from mla_convert.distill.state import Checkpoints
from mla_convert.errors import UserError
from mla_convert.files import atomic_folder

CLIPS_A_STEP = 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run: its folder and its final weights."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, case.train(folder)[1]


def assert_same(whole, folder, weights):
    assert case.outputs(folder) == case.outputs(whole[0])
    assert all(torch.equal(weights[name], expected) for name, expected in whole[1].items())


@pytest.mark.parametrize(("stopped_in", "resumed_from"), [(1, None), (2, None), (3, 3), (5, 3), (7, 6)])
def test_stopped_at_a_step(whole, tmp_path, stopped_in, resumed_from):
    with pytest.raises(case.Killed):
        case.train(tmp_path, last_clip=stopped_in * CLIPS_A_STEP)
    result, weights = case.train(tmp_path)
    assert result.resumed_from == resumed_from
    assert_same(whole, tmp_path, weights)


def test_a_finished_stage_trains_no_further(whole, tmp_path):
    case.train(tmp_path)
    result, weights = case.train(tmp_path, last_clip=-1)
    assert result.resumed_from == result.steps
    assert_same(whole, tmp_path, weights)


def test_stopped_while_a_checkpoint_is_written(whole, tmp_path, monkeypatch):
    def half_written(self, state, write):
        if state.row["step"] == 6:
            with atomic_folder(self.folder / "step-00000006") as folder:
                (folder / "student.safetensors").write_bytes(b"half")
                folder.rename(folder.with_name(".step-00000006.1.tmp"))
                raise case.Killed
        save(self, state, write)

    save = Checkpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", half_written)
        with pytest.raises(case.Killed):
            case.train(tmp_path)
    assert (tmp_path / "checkpoints" / ".step-00000006.1.tmp").exists()
    result, weights = case.train(tmp_path)
    assert result.resumed_from == 3
    assert_same(whole, tmp_path, weights)


@pytest.mark.parametrize("name", ["student.safetensors", "optimizer.pt", "state.json", "ema.safetensors"])
def test_a_checkpoint_that_was_cut_short_is_passed_over(whole, tmp_path, name):
    case.train(tmp_path)
    damaged = tmp_path / "checkpoints" / "step-00000008" / name
    damaged.write_bytes(damaged.read_bytes()[:-10])
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 9, "lo')
    result, weights = case.train(tmp_path)
    assert result.resumed_from == 6
    assert_same(whole, tmp_path, weights)


def test_without_average_and_with_accumulation(tmp_path):
    changes = {"ema_decay": None, "grad_accumulation": 2, "mixed_precision": "bf16"}
    _, expected = case.train(tmp_path / "whole", **changes)
    with pytest.raises(case.Killed):
        case.train(tmp_path / "resumed", last_clip=19, **changes)
    result, weights = case.train(tmp_path / "resumed", **changes)
    assert result.resumed_from == 3
    assert_same((tmp_path / "whole", expected), tmp_path / "resumed", weights)


def test_workers_and_bookkeeping_change_nothing(whole, tmp_path):
    _, weights = case.train(tmp_path, data_workers=1, checkpoint_every=1, keep_checkpoints=9)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole[0] / "metrics.jsonl").read_bytes()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 8
    assert all(torch.equal(weights[name], expected) for name, expected in whole[1].items())


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    case.train(tmp_path, steps=1)
    with pytest.raises(UserError, match=r"was made with learning_rate 0\.003, not 0\.001; start in another folder"):
        case.train(tmp_path, steps=1, learning_rate=1e-3)


def test_sigkill_at_any_moment(tmp_path):
    """Killed by the system without cleanup, after a step chosen by a seed."""
    step = random.Random(5).randrange(1, 12)
    changes = {"steps": 5000, "checkpoint_every": 1, "eval_every": None}
    metrics = tmp_path / "whole" / "metrics.jsonl"
    process = Python(case.__file__, tmp_path, "inf", json.dumps(changes))
    case.kill_at_row(tmp_path, step, [process])
    assert process.poll() == -signal.SIGKILL

    done = metrics.read_bytes().count(b"\n") - 1
    resumed, last_clip = tmp_path / "whole", (done + 3) * CLIPS_A_STEP - 1
    for folder in (resumed, tmp_path / "expected"):
        with pytest.raises(case.Killed):
            case.train(folder, last_clip=last_clip, **changes)
    assert case.outputs(resumed) == case.outputs(tmp_path / "expected")
    assert len(metrics.read_text().splitlines()) == done + 4


def test_two_processes(tmp_path):
    """Two processes resume bit for bit, and equal one process that accumulates twice as long.

    `whole` was killed by the system after a step chosen by a seed; `resumed` stopped in another step.
    """
    case.kill_two_processes(tmp_path, step=random.Random(7).randrange(4, 8))
    assert case.two_processes(tmp_path, last_clip=15) == ["resumed from 3\n"] * 2
    assert case.outputs(tmp_path / "resumed") == case.outputs(tmp_path / "whole")

    case.train(tmp_path / "one", grad_accumulation=2)
    two, one = (Metrics(tmp_path / folder / "metrics.jsonl").rows() for folder in ("whole", "one"))
    # Observed: 0, since halving two terms before or after adding them rounds alike.
    assert [row["loss"] for row in two[1:]] == pytest.approx([row["loss"] for row in one[1:]], rel=1e-4)
    assert two[-1]["heldout_loss"] == pytest.approx(one[-1]["heldout_loss"], rel=1e-5)
