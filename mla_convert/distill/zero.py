"""Trains under DeepSpeed's ZeRO-2 (arXiv 1910.02054): full weights everywhere, gradients and optimizer partitioned.

Weights stay float32 under autocast, as everywhere else, so the engine gets no precision setting. Its step clips
and updates the weights at once. The gradient norm is therefore read before the step, so that a stage that diverges
keeps good weights. Each process has its partition in a plain optimizer, whose state goes into the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .learner import Learner
from .state import read_optimizer

PARTS = "optimizer"


class ZeroLearner(Learner):
    """A learner whose module is a DeepSpeed engine."""

    parts = "optimizer"
    any_processes = False

    def _backward(self, loss: Tensor) -> None:
        self.module.set_gradient_accumulation_boundary(self.accelerator.sync_gradients)
        self.module.backward(loss)

    def _clip(self, limit: float | None) -> float | None:
        # The engine clips in its own step and reads the limit from this attribute.
        self.module.optimizer.clip_grad = limit or 0.0
        return float(self.module.optimizer.scaled_global_norm())

    def _step(self, skipped: bool) -> None:
        assert not skipped, "check_launch refuses stages that could skip a step under DeepSpeed"
        if self.accelerator.sync_gradients:
            self.module.step()

    def _save_optimizer(self, folder: Path) -> dict[str, Any]:
        path = self._part(folder)
        path.parent.mkdir(exist_ok=True)
        torch.save(self._partition.state_dict(), path)
        return {}

    def _load_optimizer(self, folder: Path, kept: Mapping[str, Any]) -> None:
        self._partition.load_state_dict(read_optimizer(self._part(folder)))
        self.module.optimizer.refresh_fp32_params()

    def _part(self, folder: Path) -> Path:
        """The file of this process's partition of the optimizer in a checkpoint."""
        return folder / PARTS / f"part-{self.accelerator.process_index:05d}.pt"

    @property
    def _partition(self) -> Any:
        """The plain optimizer of this process's partition."""
        return self.module.optimizer.optimizer

    def finish(self, student: Any) -> None:
        """Also release the engine, which references the parameters and stores their values in one flat tensor."""
        super().finish(student)
        self.module.optimizer.destroy()
        for parameter in self.trained.values():
            parameter.data = parameter.data.clone()
