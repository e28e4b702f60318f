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
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from ..registry import stages
from .data import Batch, Data
from .metrics import Metrics, Row
from .objective import flow_loss
from .order import NOISE, DataOrder, MicroBatches, derived_generator
from .progress import Report
from .runtime import StageModule, fast_attention, open_accelerator, tracking
from .schedule import learning_rate
from .stages.base import Stage, StageConfig
from .state import Checkpoints, TrainingState, read_checkpoint
from .trainable import freeze_all_but, trainable_names

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
    missing = [name for name in stage.networks if name not in networks]
    if missing:
        raise UserError(f"stage {config.stage} needs the network {', '.join(missing)}, which this run does not have")
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
        frozen = {name: networks[name].to(self.accelerator.device) for name in stage.networks}
        for network in frozen.values():
            network.eval().requires_grad_(False)
        optimizer = torch.optim.AdamW(
            self.trained.values(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        self.module, self.optimizer = self.accelerator.prepare(StageModule(stage, student, frozen), optimizer)
        self.average = None
        if config.ema_decay is not None:
            self.average = EMAModel(self.trained.values(), decay=config.ema_decay)

        self.metrics = Metrics(work_dir / "metrics.jsonl")
        identity = {
            **config.model_dump(mode="json", exclude=BOOKKEEPING),
            "seed": seed,
            "stage_index": stage_index,
            "processes": processes,
            "parameters": sum(parameter.numel() for parameter in self.trained.values()),
        }
        self.checkpoints = Checkpoints(work_dir / "checkpoints", identity, config.keep_checkpoints)

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
            self.average.copy_to(self.trained.values())
        self.student.eval()
        return StageResult(config.steps, row["loss"], row.get("heldout_loss"), resumed_from)

    def _batches(self, first: int) -> Iterator[Batch]:
        """This process's micro-batches from step `first` on, on its device."""
        accelerator, config = self.accelerator, self.config
        sampler = MicroBatches(
            DataOrder(self.data.size, self.seed, self.stage_index),
            config.batch_size,
            config.grad_accumulation,
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

    def _step(self, step: int, batches: Iterator[Batch]) -> Row:
        """One optimizer step over `grad_accumulation` micro-batches."""
        accelerator, config = self.accelerator, self.config
        rate = learning_rate(config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums: dict[str, Tensor] = {}
        row: Row = {"step": step + 1, "stage": config.stage}
        for micro in range(step * config.grad_accumulation, (step + 1) * config.grad_accumulation):
            number = micro * accelerator.num_processes + accelerator.process_index
            generator = derived_generator(NOISE, self.seed, self.stage_index, number)
            with accelerator.accumulate(self.module):
                loss, logs = self.module(next(batches), generator)
                accelerator.backward(loss)
                for name, value in {"loss": loss.detach(), **logs}.items():
                    sums[name] = sums.get(name, torch.zeros_like(value)) + value / config.grad_accumulation
                if accelerator.sync_gradients:
                    row |= self._mean(sums)
                    self._require_finite(step + 1, "loss", row["loss"])
                    row["grad_norm"] = self._clip(step + 1)
                self.optimizer.step()
                self.optimizer.zero_grad()
        if self.average is not None:
            self.average.step(self.trained.values())
        return {**row, "lr": rate}

    def _clip(self, step: int) -> float | None:
        """Norm of the gradient before clipping; None where fp16 overflowed and the loss scaler skips the step."""
        limit = self.config.max_grad_norm or math.inf
        norm = float(self.accelerator.clip_grad_norm_(self.trained.values(), limit))
        if self.accelerator.scaler is None:
            self._require_finite(step, "gradient norm", norm)
        return norm if math.isfinite(norm) else None

    def _mean(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Mean of each value over the processes."""
        names = list(values)
        reduced: Tensor = self.accelerator.reduce(torch.stack([values[name] for name in names]), "mean")
        return dict(zip(names, reduced.tolist(), strict=True))

    def _evaluate(self, step: int) -> dict[str, float]:
        """Held-out loss of the weights that the stage would end with. Every process computes all of it."""
        if self.heldout is None:
            return {}
        with self._averaged_weights(), self.accelerator.autocast():
            loss = flow_loss(self.student, self.heldout)
        self._require_finite(step, "held-out loss", loss)
        return {"heldout_loss": loss}

    @contextlib.contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        if self.average is None:
            yield
            return
        self.average.store(self.trained.values())
        self.average.copy_to(self.trained.values())
        try:
            yield
        finally:
            self.average.restore(self.trained.values())

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
            optimizer: dict[str, Any] = {"optimizer": self.optimizer.state_dict()}
            if self.accelerator.scaler is not None:
                optimizer["scaler"] = self.accelerator.scaler.state_dict()
            average = None
            if self.average is not None:
                average = dict(zip(self.trained, self.average.shadow_params, strict=True))
                optimizer["average_steps"] = self.average.optimization_step
            weights = {name: parameter.data for name, parameter in self.trained.items()}
            self.checkpoints.save(TrainingState(row["step"], weights, average, optimizer, row))
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

    @torch.no_grad()
    def _load(self, path: Path) -> Row:
        state = read_checkpoint(path)
        for name, parameter in self.trained.items():
            parameter.copy_(state.weights[name])
        self.optimizer.load_state_dict(state.optimizer["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.optimizer["scaler"])
        if self.average is not None and state.ema is not None:
            for name, average in zip(self.trained, self.average.shadow_params, strict=True):
                average.copy_(state.ema[name])
            self.average.optimization_step = state.optimizer["average_steps"]
        return state.row


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
