"""Runs the training loop of a stage with Accelerate. It handles steps, weights and files; the stage defines the loss.

A stage that is killed at any moment and run again ends with the same bytes of weights, optimizer, average
and metrics. Data and noise depend only on (seed, stage, micro-batch) (`order.py`), and files
are written atomically (`state.py`).
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..draws import Use, drawn
from ..errors import UserError
from ..registry import stages
from .assembly import Assembly
from .data import Batch, Data, without_worker_traceback
from .execution import execution
from .launch import check_launch, world_size
from .learner import Learner
from .metrics import Metrics, Row
from .objective import flow_loss
from .order import DataOrder, MicroBatches
from .preview import Picture, show_preview
from .progress import Report
from .requests import Requests, Stopped
from .runtime import autocast, fast_attention, open_accelerator
from .schedule import learning_rate
from .sharding import from_main
from .snapshots import Snapshots
from .stages.base import AVERAGE, START, TEACHER, Stage, StageConfig
from .state import Checkpoints
from .trackers import tracking
from .trainable import trainable_names
from .views import require_apart
from .watch import Watch, relative_distance

# Keys that do not change what a stage computes. A resumed run may change them.
BOOKKEEPING = {
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_checkpoints",
    "data_workers",
    "tracker",
    "preview",
    "shard_frozen",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageResult:
    """The result of a stage; `resumed_from` is the step of the checkpoint that it continued from, if any."""

    steps: int
    final_loss: float
    heldout_loss: float | None
    resumed_from: int | None


def run_stage(
    config: StageConfig,
    student: Any,
    networks: Mapping[str, nn.Module],
    data: Data,
    heldout: Batch | None,
    work_dir: Path,
    seed: int,
    stage_index: int,
    progress: Report | None = None,
    picture: Picture | None = None,
) -> StageResult:
    """Train `student` in place, in float32, and leave it in evaluation mode.

    With `ema_decay`, the student ends with the averaged weights. Adapters are merged.
    Checkpoints, `metrics.jsonl`, previews made by `picture`, and the tracker's files go to `work_dir`. If it holds a
    checkpoint of the same stage, training continues from there. Every process of a distributed
    run calls this. Raises UserError if training diverges (the last good checkpoint is kept) and if the
    inputs do not fit.
    """
    check_launch(config)
    config = config.over(world_size())
    stage = stages()[config.stage](config)
    wanted = [*stage.networks, *([] if stage.second is None else [stage.second.source])]
    missing = [name for name in wanted if name not in {AVERAGE, START, *networks}]
    if missing:
        raise UserError(f"stage {config.stage} needs the network {', '.join(missing)}, which this run does not have")
    if config.stop is not None and heldout is None:
        raise UserError(f"stage {config.stage}: stop needs held-out clips, which this run does not have")
    if config.preview is not None and getattr(student, "causal", None) and student.causal.window_frames is None:
        raise UserError(f"stage {config.stage}: preview needs a finite window; set causal.window_frames")
    if config.needs_negative:
        stage.negative = data.negative
    _check_conditions([student, *networks.values()], data)
    _check_identity(data)
    stage.check(student, networks, data)
    require_apart(student, trainable_names(student, config.trainable), networks)
    try:
        return _Training(stage, student, networks, data, heldout, work_dir, seed, stage_index, picture).run(progress)
    finally:
        # Wrapped networks and optimizers form reference cycles, which would stay in memory during the next stage.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _check_conditions(models: Sequence[Any], data: Data) -> None:
    """Raise UserError if the clips lack a condition that one of the models needs."""
    needed = {name for model in models for name in getattr(model, "needed_conditions", ())}
    missing = sorted(needed - data.example(0).keys()) if needed else []
    if missing:
        raise UserError(
            f"the models are conditioned on {' and '.join(missing)}, which the clips do not hold; pass these "
            "conditions to open_data"
        )


def _check_identity(data: Data) -> None:
    """Raise UserError if this process sees other clips than the first one does."""
    first = from_main(data.identity)
    if first != data.identity:
        raise UserError(
            "the processes do not see the same clips in data.folder; wait until it is written, and on NFS until every "
            "machine lists all of its shards"
        )


class _Examples(Dataset[Batch]):
    def __init__(self, data: Data) -> None:
        self.data = data

    def __getitem__(self, index: int) -> Batch:
        return self.data.example(index)


class _Training:
    def __init__(
        self,
        stage: Stage[Any],
        student: nn.Module,
        networks: Mapping[str, nn.Module],
        data: Data,
        heldout: Batch | None,
        work_dir: Path,
        seed: int,
        stage_index: int,
        picture: Picture | None,
    ) -> None:
        self.stage = stage
        self.config: StageConfig = stage.config
        self.data, self.heldout, self.picture = data, heldout, picture
        self.seed, self.stage_index, self.work_dir = seed, stage_index, work_dir
        config = self.config
        self.accelerator = open_accelerator(config, work_dir)
        processes = self.accelerator.num_processes
        if data.size is not None and data.size < processes:
            raise UserError(f"{processes} processes share {data.size} clips; use fewer processes or more data")
        self.teacher = networks.get(TEACHER)
        self.assembly = Assembly(self.accelerator, stage, student, networks, seed, stage_index)
        self.watch = Watch(config.spike, config.stop)
        self.metrics = Metrics(work_dir / "metrics.jsonl")
        learner = self.assembly.learner
        # With global_batch the clips of a step do not depend on the number of processes.
        any_processes = config.global_batch is not None and learner.any_processes
        identity = {
            **config.model_dump(mode="json", exclude=BOOKKEEPING | ({"grad_accumulation"} if any_processes else set())),
            "seed": seed,
            "stage_index": stage_index,
            "data": data.identity,
            "processes": None if any_processes else processes,
            "sharded": learner.parts,
            "parameters": sum(parameter.numel() for parameter in learner.trained.values()),
        }
        self.checkpoints = Checkpoints(work_dir / "checkpoints", identity, config.keep_checkpoints)
        self.snapshots = Snapshots(self.accelerator, self.assembly.learners, self.watch, self.checkpoints, self.metrics)
        self.teacher_loss: float | None = None

    def run(self, progress: Report | None) -> StageResult:
        config, main = self.config, self.accelerator.is_main_process
        row = self.snapshots.resume()
        resumed_from = None if row is None else row["step"]
        first = resumed_from or 0
        with (
            tracking(self.accelerator, config, self.work_dir, first),
            fast_attention(self.accelerator.device),
            execution(config, self.assembly.under_training, self.assembly.frozen),
            Requests(self.accelerator, config.checkpoint_minutes) as requests,
        ):
            self._begin(row)
            batches = self._batches(first)
            for step in range(first, config.steps):
                if self.watch.plateau:
                    break
                started = time.monotonic()
                row = self._step(step, batches)
                done, last = step + 1, step + 1 == config.steps
                if last or _due(config.eval_every, done):
                    row.update(self._evaluate(done))
                last = last or self.watch.plateau
                self._record(row, seconds=time.monotonic() - started)
                if config.preview is not None and (last or _due(config.preview.every, done)):
                    self._preview(done)
                stop, save = requests.agreed()
                if last or stop or save or _due(config.checkpoint_every, done):
                    self.snapshots.save(row)
                    requests.saved()
                if stop:
                    raise Stopped(
                        f"stage {config.stage} was stopped by a signal after step {done}, with checkpoint "
                        f"{self.checkpoints.newest()}; continue with the same command and --resume"
                    )
                if progress is not None and main:
                    progress(config.stage, done, done if last else config.steps, f"loss {row['loss']:.4g}")
        assert row is not None
        self.assembly.finish(self.work_dir)
        return StageResult(row["step"], row["loss"], row.get("heldout_loss"), resumed_from)

    def _begin(self, row: Row | None) -> None:
        """Measure the held-out losses of teacher and student before the first step; a resumed run reads them back."""
        if row is not None:
            rows = self.metrics.rows() if self.accelerator.is_main_process else []
            self.teacher_loss = rows[0].get("teacher_heldout_loss") if rows else None
            return
        start: Row = {"step": 0, "stage": self.config.stage}
        if self.heldout is not None and self.teacher is not None:
            self.teacher_loss = self._teacher_heldout_loss(self.teacher, self.heldout)
            if self.teacher_loss is not None:
                start["teacher_heldout_loss"] = self.teacher_loss
        self._record(start | self._evaluate(0))

    def _teacher_heldout_loss(self, teacher: Any, heldout: Batch) -> float | None:
        """The dense teacher's held-out loss; only in the first process if the stage itself needs no teacher."""
        if TEACHER in self.stage.networks:
            # It may be sharded, and then every process must take part.
            return self.assembly.learner.measure(lambda models: self._heldout_loss(models[TEACHER], heldout))
        if not self.accelerator.is_main_process:
            return None
        device_before = teacher.device
        with autocast(self.accelerator.device, self.config.mixed_precision):
            loss = self._heldout_loss(teacher.to(self.accelerator.device), heldout)
        teacher.to(device_before)
        return loss

    def _heldout_loss(self, model: Any, heldout: Batch) -> float:
        """The held-out loss of `model`, `batch_size` clips per forward, as many as fit in training."""
        return flow_loss(model, heldout, forward_size=self.config.batch_size, levels=self.config.noise_levels)

    def _batches(self, first: int) -> Iterator[Batch]:
        """This process's micro-batches from step `first` onward, on its device."""
        accelerator, config = self.accelerator, self.config
        sampler = MicroBatches(
            DataOrder(self.data.size, self.seed, self.stage_index),
            config.batch_size,
            config.grad_accumulation * self._updates,
            accelerator.num_processes,
            accelerator.process_index,
            first,
            config.steps,
        )
        loader = DataLoader(
            _Examples(self.data),
            batch_sampler=sampler,
            num_workers=config.data_workers,
            pin_memory=accelerator.device.type == "cuda",
            generator=torch.Generator(),
        )
        for batch in without_worker_traceback(loader):
            yield {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}

    @property
    def _updates(self) -> int:
        """Optimizer steps per step of the stage: those of the second network, then the student's."""
        return 1 if self.stage.second is None else self.stage.second.updates + 1

    def _step(self, step: int, batches: Iterator[Batch]) -> Row:
        """Take the optimizer steps of the second network, then one of the student."""
        row: Row = {"step": step + 1, "stage": self.config.stage}
        first, second_row = step * self._updates, {}
        second, average = self.assembly.second, self.assembly.learner.average
        if second is not None:
            for update in range(first, first + self._updates - 1):
                second_row = self._update(second, step, update, batches)
        row |= self._update(self.assembly.learner, step, first + self._updates - 1, batches)
        if second is not None:
            row |= {f"{second.name}_{name}": value for name, value in second_row.items()}
        if average is not None:
            if not row.get("skipped"):
                average.step()
            row["ema_distance"] = relative_distance(self.assembly.learner.weights(), average.weights)
        return {**row, "lr": learning_rate(self.config, step)}

    def _update(self, learner: Learner, step: int, update: int, batches: Iterator[Batch]) -> Row:
        """Take optimizer step number `update` of the stage, counted over both networks."""
        config, accelerator = self.config, self.accelerator
        numbers = [
            micro * accelerator.num_processes + accelerator.process_index
            for micro in range(update * config.grad_accumulation, (update + 1) * config.grad_accumulation)
        ]
        generators = (drawn(Use.NOISE, self.seed, self.stage_index, number) for number in numbers)
        self.stage.begin_update(drawn(Use.SHARED, self.seed, self.stage_index, update))
        student = learner is self.assembly.learner

        def data_batch(generator: torch.Generator) -> Batch:
            return next(batches)

        def student_batch(generator: torch.Generator) -> Batch:
            batch: Batch = self.assembly.learner.measure(self.stage.second_batch, next(batches), generator)
            return batch

        def judge(loss: float, grad_norm: float | None) -> Row:
            return self._judge(step + 1, learner.name, "" if student else f"{learner.name} ", loss, grad_norm)

        rate = learning_rate(config, step)
        if not student:
            rate *= learner.learning_rate / config.learning_rate
        loss_of, draw = (self.stage.loss, data_batch) if student else (self.stage.second_loss, student_batch)
        return learner.update(loss_of, draw, generators, rate, config.max_grad_norm, judge)

    def _judge(self, step: int, network: str, label: str, loss: float, grad_norm: float | None) -> Row:
        """Entries of the step's row about a spike; `skipped` is set if the step must not be taken.

        Raises UserError if training has diverged.
        """
        self._require_finite(step, f"{label}loss", loss)
        if grad_norm is not None:
            self._require_finite(step, f"{label}gradient norm", grad_norm)
        times = self.watch.spike_of(network, loss)
        if times is None or self.config.spike is None:
            return {}
        what = f"{label}loss is {loss:.4g}, {times:.1f} times the median of the last {self.config.spike.window} losses,"
        if self.config.spike.action == "stop":
            raise self._diverged(step, what)
        skipped = self.config.spike.action == "skip"
        if self.accelerator.is_main_process:
            then = "; the optimizer step is skipped" if skipped else ""
            logger.warning(f"stage {self.config.stage}: {what} at step {step}{then}")
        return {"spike": times, "skipped": True} if skipped else {"spike": times}

    def _evaluate(self, step: int) -> Row:
        """The held-out loss of the weights that the stage would end with. Every process computes all of it."""
        heldout = self.heldout
        if heldout is None:
            return {}
        loss = self.assembly.learner.measure_final(lambda student: self._heldout_loss(student, heldout))
        self._require_finite(step, "held-out loss", loss)
        if step > 0:
            # Different GPUs may round differently, and all processes must stop at the same step.
            self.watch.heldout(from_main(loss))
        return {"heldout_loss": loss} | ({"heldout_ratio": loss / self.teacher_loss} if self.teacher_loss else {})

    def _preview(self, step: int) -> None:
        config, heldout, picture = self.config.preview, self.heldout, self.picture
        if config is None or heldout is None or picture is None:
            return
        negative = self.stage.negative
        strip = self.assembly.learner.measure_final(lambda student: picture(student, config, heldout, negative))
        show_preview(self.accelerator, self.work_dir, strip, step)

    def _require_finite(self, step: int, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise self._diverged(step, f"{what} is {value}")

    def _diverged(self, step: int, what: str) -> UserError:
        kept = self.checkpoints.newest()
        where = f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet"
        return UserError(
            f"stage {self.config.stage} diverged: {what} at step {step}; {where}; "
            "lower learning_rate, lengthen warmup_steps or set max_grad_norm"
        )

    def _record(self, row: Row, seconds: float | None = None) -> None:
        if not self.accelerator.is_main_process:
            return
        self.metrics.append(row)
        scalars = {name: value for name, value in row.items() if isinstance(value, float)}
        if seconds is not None:
            scalars["seconds"] = seconds
        self.accelerator.log(scalars, step=row["step"])


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
