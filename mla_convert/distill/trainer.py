"""The training loop of a stage on Accelerate: it knows steps, weights and files, and no loss.

A stage killed at any moment and run again ends with the same bytes of weights, optimizer, average
and metrics: data and noise depend only on (seed, stage, micro-batch), see `order.py`, and files
appear whole or not at all, see `state.py`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from ..registry import stages
from .average import Average
from .data import Batch, Data
from .learner import Learner
from .metrics import Metrics, Row
from .objective import flow_loss
from .order import NOISE, SHARED, DataOrder, MicroBatches, derived_generator
from .progress import Report
from .runtime import StageModule, fast_attention, open_accelerator, tracking
from .schedule import learning_rate
from .stages.base import AVERAGE, START, Stage, StageConfig
from .state import Checkpoints, TrainingState, read_checkpoint
from .trainable import freeze_all_but, trainable_names
from .views import start_of, trainable_copy, with_weights

BOOKKEEPING = {"checkpoint_every", "keep_checkpoints", "data_workers", "tracker"}


@dataclass(frozen=True)
class StageResult:
    """What a stage ended with; `resumed_from` is the step of the checkpoint that it went on from."""

    steps: int
    final_loss: float
    heldout_loss: float | None
    resumed_from: int | None


def run_stage(
    config: StageConfig,
    student: nn.Module,
    networks: Mapping[str, nn.Module],
    data: Data,
    heldout: Batch | None,
    work_dir: Path,
    seed: int,
    stage_index: int,
    progress: Report | None = None,
) -> StageResult:
    """Train `student` in place, in float32, and leave it in evaluation mode.

    It ends with the averaged weights when the stage has `ema_decay`. Checkpoints, `metrics.jsonl` and
    the tracker's files go to `work_dir`; when a checkpoint of the same stage lies there, training
    goes on from it. Every process of a distributed run calls this. Raises UserError when the loss is
    not finite, with the last good checkpoint kept, and when inputs do not fit.
    """
    stage = stages()[config.stage](config)
    missing = [name for name in stage.networks if name not in {AVERAGE, START, *networks}]
    if missing:
        raise UserError(f"stage {config.stage} needs the network {', '.join(missing)}, which this run does not have")
    stage.check(student, networks, data)
    return _Training(stage, student, networks, data, heldout, work_dir, seed, stage_index).run(progress)


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
    ) -> None:
        self.stage = stage
        self.config: StageConfig = stage.config
        self.student, self.data, self.heldout = student, data, heldout
        self.seed, self.stage_index = seed, stage_index
        config = self.config
        self.accelerator = open_accelerator(config, work_dir)
        processes = self.accelerator.num_processes
        if data.size is not None and data.size < processes:
            raise UserError(f"{processes} processes share {data.size} clips; use fewer processes or more data")

        student.float().train()
        self.trained = freeze_all_but(student, trainable_names(student, config.trainable))
        others = {name: networks[name].to(self.accelerator.device) for name in stage.networks if name in networks}
        for network in others.values():
            network.eval().requires_grad_(False)
        self.second = self._second(stage, others)
        module = StageModule(stage.loss, "student", student, others)
        self.learner = Learner(
            self.accelerator, module, self.trained, config.learning_rate, config.betas, config.weight_decay
        )
        if START in stage.networks:
            module.others[START] = start_of(student, self.trained)
        self.average = None
        if config.ema_decay is not None:
            self.average = Average(self.trained, config.ema_decay)
            if AVERAGE in stage.networks:
                module.others[AVERAGE] = with_weights(student, self.average.weights)

        self.metrics = Metrics(work_dir / "metrics.jsonl")
        identity = {
            **config.model_dump(mode="json", exclude=BOOKKEEPING),
            "seed": seed,
            "stage_index": stage_index,
            "processes": processes,
            "parameters": sum(parameter.numel() for parameter in self.trained.values()),
        }
        self.checkpoints = Checkpoints(work_dir / "checkpoints", identity, config.keep_checkpoints)

    def _second(self, stage: Stage[Any], others: dict[str, nn.Module]) -> Learner | None:
        """The stage's second network, which comes to `others` as a copy of its source."""
        second = stage.second
        if second is None:
            return None
        network = trainable_copy(others[second.source])
        trained = freeze_all_but(network, trainable_names(network, second.trainable))
        others[second.name] = network
        module = StageModule(stage.second_loss, second.name, network, {**others, "student": self.student})
        rates = (second.learning_rate, second.betas, second.weight_decay)
        return Learner(self.accelerator, module, trained, *rates, second.updates)

    def run(self, progress: Report | None) -> StageResult:
        config, main = self.config, self.accelerator.is_main_process
        row = self._resume()
        resumed_from = None if row is None else row["step"]
        first = resumed_from or 0
        with tracking(self.accelerator, config, first), fast_attention(self.accelerator.device):
            if row is None:
                self._record({"step": 0, "stage": config.stage, **self._evaluate(0)})
            batches = self._batches(first)
            for step in range(first, config.steps):
                started = time.monotonic()
                row = self._step(step, batches)
                done, last = step + 1, step + 1 == config.steps
                if last or _due(config.eval_every, done):
                    row.update(self._evaluate(done))
                self._record(row, seconds=time.monotonic() - started)
                if last or _due(config.checkpoint_every, done):
                    self._save(row)
                if progress is not None and main:
                    progress(config.stage, done, config.steps, f"loss {row['loss']:.4g}")
        assert row is not None
        if self.average is not None:
            self.average.copy_to_trained()
        self.student.eval()
        return StageResult(config.steps, row["loss"], row.get("heldout_loss"), resumed_from)

    def _batches(self, first: int) -> Iterator[Batch]:
        """This process's micro-batches from step `first` on, on its device."""
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
        for batch in loader:
            yield {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}

    @property
    def _updates(self) -> int:
        """Optimizer steps in a step of the stage: those of the second network, then the student's."""
        return 1 if self.second is None else self.second.updates + 1

    def _step(self, step: int, batches: Iterator[Batch]) -> Row:
        """One optimizer step of the student, after those of the second network."""
        row: Row = {"step": step + 1, "stage": self.config.stage}
        first, seconds = step * self._updates, {}
        if self.second is not None:
            for update in range(first, first + self.second.updates):
                seconds = self._update(self.second, step, update, batches)
        row |= self._update(self.learner, step, first + self._updates - 1, batches)
        if self.second is not None:
            row |= {f"{self.second.name}_{name}": value for name, value in seconds.items()}
        if self.average is not None:
            self.average.step()
        return {**row, "lr": learning_rate(self.config, step)}

    def _update(self, learner: Learner, step: int, update: int, batches: Iterator[Batch]) -> Row:
        """Optimizer step number `update` of the stage, counted over both networks."""
        config, accelerator = self.config, self.accelerator
        numbers = [
            micro * accelerator.num_processes + accelerator.process_index
            for micro in range(update * config.grad_accumulation, (update + 1) * config.grad_accumulation)
        ]
        generators = (derived_generator(NOISE, self.seed, self.stage_index, number) for number in numbers)
        self.stage.begin_update(derived_generator(SHARED, self.seed, self.stage_index, update))
        name = "" if learner is self.learner else f"{learner.name} "

        def require_finite(what: str, value: float) -> None:
            self._require_finite(step + 1, name + what, value)

        rate = learning_rate(config, step)
        if learner is not self.learner:
            rate *= learner.learning_rate / config.learning_rate
        return learner.update(batches, generators, rate, config.max_grad_norm, require_finite)

    def _evaluate(self, step: int) -> dict[str, float]:
        """Held-out loss of the weights that the stage would end with. Every process computes all of it."""
        if self.heldout is None:
            return {}
        averaged = contextlib.nullcontext() if self.average is None else self.average.in_place()
        with averaged, self.accelerator.autocast():
            loss = flow_loss(self.student, self.heldout)
        self._require_finite(step, "held-out loss", loss)
        return {"heldout_loss": loss}

    def _require_finite(self, step: int, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        kept = self.checkpoints.newest()
        where = f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet"
        raise UserError(
            f"stage {self.config.stage} diverged: {what} is {value} at step {step}; {where}; "
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

    def _save(self, row: Row) -> None:
        if self.accelerator.is_main_process:
            optimizer: dict[str, Any] = {"optimizer": self.learner.optimizer.state_dict()}
            if self.accelerator.scaler is not None:
                optimizer["scaler"] = self.accelerator.scaler.state_dict()
            average = second = None
            if self.average is not None:
                average, optimizer["average_steps"] = self.average.weights, self.average.steps
            if self.second is not None:
                second = self.second.weights()
                optimizer["second"] = self.second.optimizer.state_dict()
            self.checkpoints.save(TrainingState(row["step"], self.learner.weights(), average, optimizer, row, second))
        self.accelerator.wait_for_everyone()

    def _resume(self) -> Row | None:
        """Load the newest checkpoint and forget what came after it; its last row, None when there is none."""
        newest = self.checkpoints.newest()
        row = None if newest is None else self._load(newest)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.checkpoints.discard_broken()
            self.metrics.rewind(-1 if row is None else row["step"])
        return row

    def _load(self, path: Path) -> Row:
        state = read_checkpoint(path)
        self.learner.load(state.weights, state.optimizer["optimizer"])
        if self.second is not None and state.second is not None:
            self.second.load(state.second, state.optimizer["second"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.optimizer["scaler"])
        if self.average is not None and state.ema is not None:
            self.average.load(state.ema, state.optimizer["average_steps"])
        return state.row


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
