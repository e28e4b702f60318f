"""Saves a running stage to a checkpoint and restores it, with everything that the next step depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from .assembly import Assembly
from .metrics import Metrics, Row
from .sharding import SECOND_SHARDS, SHARDS, from_main, load_shards, save_shards
from .state import Checkpoints, TrainingState, read_checkpoint, read_optimizer
from .watch import Watch

PARTS = "optimizer"


class Snapshots:
    """Saves and restores the networks of an `Assembly` and the state of `watch`. Every process takes part."""

    def __init__(
        self, accelerator: Accelerator, assembly: Assembly, watch: Watch, checkpoints: Checkpoints, metrics: Metrics
    ) -> None:
        self.accelerator, self.assembly, self.watch = accelerator, assembly, watch
        self.checkpoints, self.metrics = checkpoints, metrics

    def save(self, row: Row) -> None:
        """Write a checkpoint after the step that `row` describes."""
        if self.accelerator.is_main_process:
            state = self._state(row)
            if self._all_write:
                self.checkpoints.save(state, lambda folder: self._save_parts(from_main(folder)))
            else:
                self.checkpoints.save(state)
        elif self._all_write:
            self._save_parts(from_main(None))
        self.accelerator.wait_for_everyone()

    def _state(self, row: Row) -> TrainingState:
        assembly, optimizer = self.assembly, dict[str, Any]()
        weights = average = second = None
        if not assembly.sharded:
            weights = assembly.learner.weights()
            if not assembly.learner.partitioned:
                optimizer["optimizer"] = assembly.learner.own_optimizer.state_dict()
        if self.accelerator.scaler is not None:
            optimizer["scaler"] = self.accelerator.scaler.state_dict()
        if assembly.average is not None:
            optimizer["average_steps"] = assembly.average.steps
            average = None if assembly.sharded else assembly.average.weights
        if assembly.second is not None and not assembly.sharded:
            second = assembly.second.weights()
            optimizer["second"] = assembly.second.optimizer.state_dict()
        return TrainingState(row["step"], weights or {}, average, optimizer, row, second, self.watch.state())

    @property
    def _all_write(self) -> bool:
        """Whether every process writes its own part of a checkpoint."""
        return self.assembly.sharded or self.assembly.learner.partitioned

    def _save_parts(self, folder: Path) -> None:
        assembly = self.assembly
        if assembly.learner.partitioned:
            path = self._part(folder)
            path.parent.mkdir(exist_ok=True)
            torch.save(assembly.learner.own_optimizer.state_dict(), path)
            # The first process records all files, so it must wait until they exist.
            self.accelerator.wait_for_everyone()
            return
        average = None if assembly.average is None else assembly.average.weights
        save_shards(folder / SHARDS, assembly.learner.module, assembly.learner.optimizer.optimizer, average)
        if assembly.second is not None:
            save_shards(folder / SECOND_SHARDS, assembly.second.module, assembly.second.optimizer.optimizer, None)

    def _part(self, folder: Path) -> Path:
        """The file of this process's partition of the optimizer in a checkpoint."""
        return folder / PARTS / f"part-{self.accelerator.process_index:05d}.pt"

    def resume(self) -> Row | None:
        """Load the newest checkpoint and drop later metrics; return its last row, or None without a checkpoint."""
        # Machines may see different states of a shared folder, so the first process decides.
        newest = from_main(self.checkpoints.newest())
        row = None if newest is None else self._load(newest)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.checkpoints.discard_broken()
            self.metrics.rewind(-1 if row is None else row["step"])
        return row

    def _load(self, path: Path) -> Row:
        assembly, state = self.assembly, read_checkpoint(path)
        average = assembly.average
        if assembly.sharded:
            weights = None if average is None else average.weights
            load_shards(path / SHARDS, assembly.learner.module, assembly.learner.optimizer.optimizer, weights)
            if average is not None:
                average.loaded(state.optimizer["average_steps"])
            if assembly.second is not None:
                load_shards(path / SECOND_SHARDS, assembly.second.module, assembly.second.optimizer.optimizer, None)
        else:
            learner = assembly.learner
            own = read_optimizer(self._part(path)) if learner.partitioned else state.optimizer["optimizer"]
            learner.load(state.weights, own)
            if average is not None and state.ema is not None:
                average.load(state.ema, state.optimizer["average_steps"])
        if assembly.second is not None and state.second is not None:
            assembly.second.load(state.second, state.optimizer["second"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.optimizer["scaler"])
        self.watch.load(state.watch)
        return state.row
