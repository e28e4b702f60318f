"""Runs the training loop of a stage with Accelerate. It handles steps, weights and files; the stage defines the loss.

A stage that is killed at any moment and run again ends with the same bytes of weights, optimizer, average
and metrics. Data and noise depend only on (seed, stage, micro-batch) (`order.py`), and files
are written atomically (`state.py`).
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import UserError
from ..registry import stage_of
from .assembly import Assembly
from .data import Batch, Data
from .execution import execution
from .feed import MicroBatch, Update, feed
from .heldout import HeldOut
from .judge import Judge
from .launch import check_launch, world_size
from .learner import Learner, LossOf
from .metrics import Metrics, Row
from .needs import check_needs
from .preview import Picture, show_preview
from .progress import Report
from .requests import Requests, Stopped
from .runtime import fast_attention, free_memory, open_accelerator
from .schedule import learning_rate
from .sharding import from_main
from .snapshots import Snapshots
from .stages.base import TEACHER, ImageLatent, Stage, StageConfig
from .state import Checkpoints, Owed
from .trackers import tracking
from .trainable import trainable_names
from .views import require_apart
from .watch import Watch, relative_distance

logger = logging.getLogger(__name__)

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
    second_start: Path | None = None,
    load_teacher: Callable[[], nn.Module] | None = None,
    start: str | None = None,
    image_latent: ImageLatent | None = None,
) -> StageResult:
    """Train `student` in place, in float32, and leave it in evaluation mode.

    With `ema_decay`, the student ends with the averaged weights. Adapters are merged. A second network that continues
    begins with the weights in `second_start`, the file that an earlier stage left (`SecondNetwork.file`).
    Checkpoints, `metrics.jsonl`, previews made by `picture`, and the tracker's files go to `work_dir`. If it holds a
    checkpoint of the same stage, training continues from there. A checkpoint holds only what is trained, so it has to
    be of the same `start`, a digest of what `student` and `second_start` were read from, which the first process
    gives. A stage that re-encodes calls `image_latent`. Every process of a distributed run calls this.

    The held-out loss of the dense model is measured once: of the teacher in `networks`, or without one, in the first
    process alone, of what `load_teacher` returns, which is dropped. Raises UserError if training diverges (the last
    good checkpoint is kept) and if the inputs do not fit.
    """
    check_launch(config)
    config = config.over(world_size())
    stage: Stage[Any] = stage_of(config)
    if config.stop is not None and heldout is None:
        raise UserError(f"stage {config.stage}: stop needs held-out clips, which this run does not have")
    check_needs(stage, student, networks, data)
    if stage.second is not None and stage.second.continues and not (second_start and second_start.is_file()):
        raise UserError(
            f"stage {config.stage}: {second_start or 'no earlier stage'} has no {stage.second.name} to continue from; "
            "train the stage before it again, or start it as a copy of the teacher"
        )
    _check_identity(data)
    if config.needs_negative:
        stage.negative = data.negative
    if config.reencodes and image_latent is None:
        raise UserError(f"stage {config.stage}: reencode_first needs a VAE, which this run does not have; leave it out")
    stage.image_latent = image_latent
    require_apart(student, trainable_names(student, config.trainable), networks)
    try:
        # Not in a variable, which would keep it from being freed below.
        return _Training(
            stage,
            student,
            networks,
            data,
            heldout,
            work_dir,
            seed,
            stage_index,
            picture,
            second_start,
            load_teacher,
            start,
        ).run(progress)
    finally:
        # Wrapped networks and optimizers form reference cycles, which would stay in memory during the next stage.
        free_memory()


def _check_identity(data: Data) -> None:
    """Raise UserError if this process sees other clips than the first one does."""
    first = from_main(data.identity)
    if first != data.identity:
        raise UserError(
            "the processes do not see the same clips in data.folder; wait until it is written, and on NFS until every "
            "machine lists all of its shards"
        )


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
        second_start: Path | None,
        load_teacher: Callable[[], nn.Module] | None,
        start: str | None,
    ) -> None:
        self.stage = stage
        self.config: StageConfig = stage.config
        self.data, self.seed, self.stage_index = data, seed, stage_index
        self.heldout_clips, self.picture, self.work_dir = heldout, picture, work_dir
        config = self.config
        self.accelerator = open_accelerator(config, work_dir)
        self.assembly = Assembly(self.accelerator, stage, student, networks, seed, stage_index, second_start)
        self.metrics = Metrics(work_dir / "metrics.jsonl")
        learner = self.assembly.learner
        # With global_batch the clips of a step do not depend on the number of processes.
        any_processes = config.global_batch is not None and learner.any_processes
        identity = {
            **config.model_dump(mode="json", exclude=BOOKKEEPING | ({"grad_accumulation"} if any_processes else set())),
            "seed": seed,
            "stage_index": stage_index,
            "data": data.identity,
            "start": from_main(start),
            "processes": None if any_processes else self.accelerator.num_processes,
            "sharded": learner.parts,
            "parameters": sum(parameter.numel() for parameter in learner.trained.values()),
        }
        self.checkpoints = Checkpoints(work_dir / "checkpoints", identity, config.keep_checkpoints)
        self.watch = Watch(config.spike, config.stop)
        self.judge = Judge(config, self.watch, self.checkpoints, self.accelerator.is_main_process)
        teacher = networks.get(TEACHER)
        self.heldout = HeldOut(heldout, config, learner, teacher, load_teacher, TEACHER in stage.networks)
        self.snapshots = Snapshots(self.accelerator, self.assembly.learners, self.watch, self.checkpoints, self.metrics)

    def run(self, progress: Report | None) -> StageResult:
        config, main = self.config, self.accelerator.is_main_process
        row, owed = self.snapshots.resume()
        resumed_from = None if row is None else row["step"]
        first = resumed_from or 0
        if first and main:
            logger.info("%s goes on after step %d", config.stage, first)
        with (
            tracking(self.accelerator, config, self.work_dir, first, owed is not None),
            fast_attention(self.accelerator.device),
            execution(config, self.assembly.under_training, self.assembly.frozen),
            Requests(self.accelerator, config.checkpoint_minutes) as requests,
        ):
            if progress is not None and main:
                progress(config.stage, first, config.steps)
            self._begin(row)
            updates = feed(
                self.accelerator, config, self.data, self.seed, self.stage_index, self._updates_a_step, first
            )
            for step in range(first - (owed is not None), config.steps):
                started = time.monotonic()
                if owed is None:
                    if self.watch.plateau:
                        break
                    row = self._step(step, updates)
                assert row is not None
                owed = self._conclude(row, started, requests, owed)
                done, last = step + 1, step + 1 == config.steps or self.watch.plateau
                stop, save = requests.agreed()
                if last or stop or save or _due(config.checkpoint_every, done):
                    self.snapshots.save(row, owed)
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
        if row is None:
            start: Row = {"step": 0, "stage": self.config.stage}
            self._record(start | self.heldout.begin() | self._evaluate(0))
        else:
            self.heldout.resume(self.metrics.rows() if self.accelerator.is_main_process else [])

    def _conclude(self, row: Row, started: float, requests: Requests, owed: Owed | None) -> Owed | None:
        """Measure, record and show what is due after the step that `row` describes; of an `owed` step, what is left.

        Returns what is left out because the stage is to stop: the time until the kill may not be enough for it.
        """
        config, done = self.config, row["step"]
        last = done == config.steps
        if owed != "preview":
            if last or _due(config.eval_every, done):
                if self.heldout_clips is not None and requests.stopping():
                    return "heldout"
                row.update(self._average_distance() | self._evaluate(done))
            self._record(row, seconds=time.monotonic() - started)
        if self._preview_due(done, last or self.watch.plateau):
            if requests.stopping():
                return "preview"
            self._preview(done)
        return None

    def _evaluate(self, step: int) -> Row:
        """The held-out loss, if there is one."""
        losses = self.heldout.measure()
        if losses:
            self.judge.heldout(step, losses["heldout_loss"])
        return losses

    def _average_distance(self) -> Row:
        """How far the average is from the weights, if there is one; every process calls this."""
        learner = self.assembly.learner
        if learner.average is None:
            return {}
        return {"ema_distance": relative_distance(learner.weights(), learner.average.weights)}

    @property
    def _updates_a_step(self) -> int:
        """Optimizer steps per step of the stage: those of the second network, then the student's."""
        return 1 if self.stage.second is None else self.stage.second.updates + 1

    def _step(self, step: int, updates: Iterator[Update]) -> Row:
        """Take the optimizer steps of the second network, then one of the student."""
        stage, student, second = self.stage, self.assembly.learner, self.assembly.second
        second_row: Row = {}
        if second is not None:
            for update in itertools.islice(updates, self._updates_a_step - 1):
                made = update._replace(batches=self._made_by_student(update.batches))
                second_row = self._update(second, stage.second_loss, step, made)
        row = {"step": step + 1, "stage": self.config.stage}
        row |= self._update(student, stage.loss, step, next(updates))
        if second is not None:
            row |= {f"{second.name}_{name}": value for name, value in second_row.items()}
        if student.average is not None and not row.get("skipped"):
            student.average.step()
        return {**row, "lr": learning_rate(self.config, step)}

    def _made_by_student(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """The batches that the second network learns from, which the student makes of `batches`."""
        for clips, generator in batches:
            yield MicroBatch(self.assembly.learner.measure(self.stage.second_batch, clips, generator), generator)

    def _update(self, learner: Learner, loss_of: LossOf, step: int, update: Update) -> Row:
        """Take one optimizer step of `learner`, in step number `step` of the stage."""
        self.stage.begin_update(update.shared)
        config, judge = self.config, functools.partial(self.judge.training, step + 1, learner.name)
        rate = learning_rate(config, step) * (learner.learning_rate / config.learning_rate)
        return learner.update(loss_of, update.batches, rate, config.max_grad_norm, judge)

    def _preview_due(self, step: int, last: bool) -> bool:
        config = self.config.preview
        if config is None or self.heldout_clips is None or self.picture is None:
            return False
        return last or _due(config.every, step)

    def _preview(self, step: int) -> None:
        config, heldout, picture = self.config.preview, self.heldout_clips, self.picture
        if config is None or heldout is None or picture is None:
            return
        negative = self.stage.negative
        strip = self.assembly.learner.measure_final(lambda student: picture(student, config, heldout, negative))
        show_preview(self.accelerator, self.work_dir, strip, step)

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
