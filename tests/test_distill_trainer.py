"""The training loop: what it trains, what it writes, and how it ends when something is wrong."""

from __future__ import annotations

import copy
import errno
import gc
import io
import json
import weakref

import distill_case as case
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import default_collate

import mla_convert.distill.state as state
from mla_convert.convert import ConvertConfig, convert_model
from mla_convert.distill.learner import Learner
from mla_convert.distill.metrics import Metrics
from mla_convert.distill.objective import flow_loss
from mla_convert.distill.progress import progress_bars
from mla_convert.distill.sharding import load_shards, save_shards
from mla_convert.distill.trainable import trainable_names
from mla_convert.distill.trainer import run_stage
from mla_convert.distill.views import require_apart
from mla_convert.draws import Use, drawn
from mla_convert.errors import UserError
from mla_convert.families.wan import FAMILY
from mla_convert.registry import stages


def rows(folder):
    return Metrics(folder / "metrics.jsonl").rows()


def run(folder, config, student, teacher=None, data=None, heldout=None, progress=None):
    networks = {} if teacher is None else {"teacher": teacher}
    return run_stage(config, student, networks, data or case.Clips(), heldout, folder, 0, 0, progress)


def test_a_student_that_shares_what_it_trains_with_its_teacher_is_refused(tmp_path):
    teacher = case.tiny_model().requires_grad_(False)
    student = convert_model(FAMILY, teacher, ConvertConfig(init="svd", kv_lora_rank=12))
    shared = r"student's blocks\.0\..* shares memory with the network teacher"
    with pytest.raises(ValueError, match=shared):
        run(tmp_path, case.make_config(trainable="attention"), student, teacher)
    require_apart(student, trainable_names(student, "latent"), {"teacher": teacher})
    run(tmp_path, case.make_config(trainable="attention", steps=1, warmup_steps=0), copy.deepcopy(student), teacher)
    assert all(map(torch.equal, teacher.state_dict().values(), case.tiny_model().state_dict().values()))


def test_the_student_comes_closer_to_the_teacher(tmp_path):
    teacher = case.tiny_model()
    student = case.perturbed(teacher)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    heldout = case.Clips().heldout()
    seen = []

    def report(what, done, total, detail=""):
        seen.append((what, done, total))

    config = case.make_config(steps=30, eval_every=10)
    result = run(tmp_path, config, student, teacher, heldout=heldout, progress=report)

    metrics = rows(tmp_path)
    assert [row["step"] for row in metrics] == list(range(31))
    assert [row["step"] for row in metrics if "heldout_loss" in row] == [0, 10, 20, 30]
    # Observed: 0.0098 to 0.0003.
    assert metrics[-1]["teacher_loss"] < 0.2 * metrics[1]["teacher_loss"]
    assert (result.final_loss, result.heldout_loss) == (metrics[-1]["loss"], metrics[-1]["heldout_loss"])
    assert seen == [("match_velocity", step, 30) for step in range(31)]
    assert not student.training
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, _ in student.named_parameters() if ".attn1." in name}


def test_it_ends_with_the_average(tmp_path):
    result, weights = case.train(tmp_path)
    last = tmp_path / "checkpoints" / "step-00000008"
    average, raw = load_file(last / "ema.safetensors"), load_file(last / "student.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in average.items())
    assert not all(torch.equal(average[name], raw[name]) for name in raw)
    student = case.tiny_model()
    student.load_state_dict(weights)
    assert flow_loss(student, case.Clips().heldout()) == pytest.approx(result.heldout_loss, abs=1e-6)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_nothing_of_a_stage_stays_in_memory(tmp_path, precision, monkeypatch):
    """Otherwise its optimizer's state and its wrapped student would coexist with the next stage's."""
    learners = []
    built = Learner.__init__

    def remembered(self, *arguments):
        built(self, *arguments)
        learners.extend(weakref.ref(part) for part in (self, self.module, self.optimizer))

    monkeypatch.setattr(Learner, "__init__", remembered)
    gc.disable()
    try:
        case.train(tmp_path, steps=2, mixed_precision=precision, ema_decay=0.9)
        assert len(learners) == 3 and all(part() is None for part in learners)
    finally:
        gc.enable()


def test_accumulation_is_the_recipes_whatever_the_launcher_says(tmp_path, monkeypatch):
    expected = case.train(tmp_path / "alone", steps=2, grad_accumulation=2)[1]
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    found = case.train(tmp_path / "launched", steps=2, grad_accumulation=2)[1]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_stages_of_different_precision_follow_each_other(tmp_path):
    plain, _ = case.train(tmp_path / "1", steps=1)
    mixed, _ = case.train(tmp_path / "2", steps=1, mixed_precision="bf16")
    again, _ = case.train(tmp_path / "3", steps=1)
    assert plain == again
    assert plain.final_loss != mixed.final_loss
    assert plain.heldout_loss == pytest.approx(mixed.heldout_loss, rel=1e-2)


def plain_loop(student, teacher, config):
    """The same training in plain PyTorch; returns the averaged weights."""
    names = [name for name, _ in student.named_parameters() if ".attn1." in name]
    parameters = [student.get_parameter(name) for name in names]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    stage, data = stages()[config.stage](config), case.Clips()
    average = [parameter.detach().clone() for parameter in parameters]
    for step in range(config.steps):
        for micro in range(2 * step, 2 * step + 2):
            clips = default_collate([data.example(2 * micro), data.example(2 * micro + 1)])
            models = {"student": student, "teacher": teacher}
            loss, _ = stage.loss(models, clips, drawn(Use.NOISE, 0, 0, micro))
            (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        student.zero_grad()
        decay = 0.0 if step == 0 else min(config.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for kept, parameter in zip(average, parameters, strict=True):
                kept.lerp_(parameter, 1 - decay)
    return dict(zip(names, average, strict=True))


def test_it_is_the_plain_loop(tmp_path):
    changes = {
        "steps": 4,
        "grad_accumulation": 2,
        "schedule": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 0.01,
        "weight_decay": 0.1,
    }
    _, weights = case.train(tmp_path, **changes)
    teacher = case.tiny_model()
    # Adam turns the rounding of another attention backend into whole steps where the gradient is near zero.
    with sdpa_kernel(SDPBackend.MATH):
        expected = plain_loop(case.perturbed(teacher), teacher, case.make_config(**changes))
    # Observed: 4e-9 for weights of order 0.1.
    error = max((weights[name] - tensor).abs().max().item() for name, tensor in expected.items())
    assert error < 1e-6


def test_only_the_newest_checkpoints_stay(tmp_path):
    case.train(tmp_path, checkpoint_every=1, keep_checkpoints=3)
    assert [path.name[-2:] for path in sorted((tmp_path / "checkpoints").iterdir())] == ["06", "07", "08"]


def test_tensorboard_has_the_metrics_and_the_seconds(tmp_path):
    changes = {"tracker": "tensorboard", "steps": 6, "checkpoint_every": 3}
    with pytest.raises(case.Killed):
        case.train(tmp_path, last_clip=9, **changes)
    case.train(tmp_path, **changes)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == list(range(1, 7))
    assert [event.value for event in losses] == pytest.approx([row["loss"] for row in rows(tmp_path)[1:]])
    assert len(events.Scalars("seconds")) == 6
    assert "seconds" not in (tmp_path / "metrics.jsonl").read_text()


class Poisoned(case.Clips):
    """Clips that are NaN from index `first` on."""

    def __init__(self, first):
        super().__init__()
        self.first = first

    def example(self, index):
        clip = super().example(index)
        return clip if index < self.first else {**clip, "latents": clip["latents"] * float("nan")}


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    teacher = case.tiny_model()
    with pytest.raises(UserError, match=r"diverged: loss is nan at step 6; the last good .*00003; lower"):
        run(tmp_path, case.make_config(), case.perturbed(teacher), teacher, Poisoned(10))
    assert [row["step"] for row in rows(tmp_path)] == list(range(6))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    # Mended, it goes on from there.
    assert run(tmp_path, case.make_config(), case.perturbed(teacher), teacher).resumed_from == 3


def test_a_loss_that_is_not_finite_at_once(tmp_path):
    teacher = case.tiny_model()
    with pytest.raises(UserError, match="loss is nan at step 1; there is no checkpoint yet") as error:
        run(tmp_path, case.make_config(), case.perturbed(teacher), teacher, Poisoned(0))
    assert "\n" not in str(error.value)


def test_a_missing_network(tmp_path):
    with pytest.raises(UserError, match="match_velocity needs the network teacher, which this run does not have"):
        run(tmp_path, case.make_config(), case.tiny_model())
    assert run(tmp_path, case.make_config(steps=1, teacher_weight=0), case.tiny_model()).steps == 1


def test_fp16_needs_a_gpu(tmp_path):
    with pytest.raises(UserError, match="mixed_precision: fp16 needs a GPU; use bf16 or no on the CPU"):
        case.train(tmp_path, mixed_precision="fp16")


def test_more_processes_than_clips(tmp_path):
    data = case.Clips()
    data.size = 0
    with pytest.raises(UserError, match="1 processes share 0 clips; use fewer processes or more data"):
        run(tmp_path, case.make_config(teacher_weight=0), case.tiny_model(), data=data)


@pytest.mark.parametrize("error", [state.SafetensorError("I/O error: No space left on device (os error 28)"), None])
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, error):
    def full(*_):
        raise error or OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(UserError, match=r"the disk is full: cannot write .*step-00000003; free some space"):
        case.train(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_full_disk_is_one_line_for_shards_too(tmp_path, monkeypatch):
    """torch wraps the error of any process in an exception that `except Exception` does not catch."""
    model = case.tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints = state.Checkpoints(tmp_path / "checkpoints", {}, keep=1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def save():
        reached = state.TrainingState({"step": 1}, {})
        checkpoints.save(reached, lambda folder: save_shards(folder / "shards", model, optimizer, None))

    with monkeypatch.context() as patch:
        patch.setattr(FileSystem, "create_stream", full)
        with pytest.raises(UserError, match=r"the disk is full: cannot write .*step-00000001; free some space"):
            save()
    assert list((tmp_path / "checkpoints").iterdir()) == []
    save()
    (shard,) = checkpoints.newest().glob("shards/*.distcp")
    shard.unlink()
    with pytest.raises(FileNotFoundError):
        load_shards(shard.parent, model, optimizer, None)


def test_metrics_skip_a_half_written_row(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    assert metrics.rows() == []
    for step in range(4):
        metrics.append({"step": step, "loss": step / 3})
    whole = metrics.path.read_bytes()
    metrics.path.write_bytes(whole + b'{"step": 4, "lo')
    metrics.rewind(9)
    assert metrics.path.read_bytes() == whole
    metrics.rewind(1)
    assert metrics.rows() == [json.loads(line) for line in whole.splitlines()[:2]]


def test_progress_shows_one_bar_a_job_with_the_time_left():
    screen = io.StringIO()
    with progress_bars(Console(file=screen, force_terminal=True, width=120)) as report:
        report("calibrate", 1, 1)
        report("match_velocity", 1, 30, "loss 0.5")
        report("match_velocity", 3, 30, "loss 0.25")
    last = screen.getvalue().splitlines()
    assert any("calibrate" in line and "1/1" in line for line in last)
    assert any("match_velocity" in line and "3/30" in line and "loss 0.25" in line for line in last)
