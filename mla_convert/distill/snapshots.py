"""Saves a running stage to a checkpoint and restores it, with everything that the next step depends on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from .learner import Learner
from .metrics import Metrics, Row
from .sharding import from_main
from .state import OPTIMIZER, Checkpoints, Owed, TrainingState, read_checkpoint, read_optimizer
from .watch import Watch


class Snapshots:
    """Saves and restores the `learners` of a stage and the state of `watch`. Every process takes part."""

    def __init__(
        self,
        accelerator: Accelerator,
        learners: Sequence[Learner],
        watch: Watch,
        checkpoints: Checkpoints,
        metrics: Metrics,
    ) -> None:
        self.accelerator, self.learners, self.watch = accelerator, learners, watch
        self.checkpoints, self.metrics = checkpoints, metrics

    def save(self, row: Row, owed: Owed | None = None) -> None:
        """Write a checkpoint after the step that `row` describes, of which a resumed stage still has to do `owed`."""
        if self.accelerator.is_main_process:
            self.checkpoints.save(TrainingState(row, self.watch.state(), owed), self._write)
        else:
            self._write(None)
        self.accelerator.wait_for_everyone()

    def _write(self, own: Path | None) -> None:
        """Write to the folder that the first process gives as its `own`."""
        folder = from_main(own)
        kept: dict[str, Any] = {}
        for learner in self.learners:
            kept |= learner.save(folder)
        if self.accelerator.scaler is not None:
            kept["scaler"] = self.accelerator.scaler.state_dict()
        if self.accelerator.is_main_process:
            torch.save(kept, folder / OPTIMIZER)
        # The first process records all files, so it must wait until they exist.
        self.accelerator.wait_for_everyone()

    def resume(self) -> tuple[Row | None, Owed | None]:
        """Load the newest checkpoint and drop later metrics.

        Returns the row of its step, or None without a checkpoint, and what of this step is still to be done.
        """
        # Machines may see different states of a shared folder, so the first process decides.
        newest = from_main(self.checkpoints.newest())
        row, owed = (None, None) if newest is None else self._load(newest)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.checkpoints.discard_broken()
            # The row of a step whose held-out loss is owed is recorded with it.
            self.metrics.rewind(-1 if row is None else row["step"] - (owed == "heldout"))
        return row, owed

    def _load(self, path: Path) -> tuple[Row, Owed | None]:
        state, kept = read_checkpoint(path), read_optimizer(path / OPTIMIZER)
        for learner in self.learners:
            learner.load(path, kept)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(kept["scaler"])
        self.watch.load(state.watch)
        return state.row, state.owed
