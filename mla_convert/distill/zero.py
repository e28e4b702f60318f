"""A stage under DeepSpeed's ZeRO-2 (arXiv 1910.02054): weights whole everywhere, gradients and optimizer in parts.

Weights stay float32 and autocast computes, as everywhere else, so the engine is told of no precision. Its step clips
and moves the weights at once; here the gradient's norm is asked for before it, so that a stage that diverges ends
with good weights. Each process writes its part of the optimizer to a checkpoint in plain tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .learner import Learner

PARTS = "optimizer"


class ZeroLearner(Learner):
    """A learner whose module is a DeepSpeed engine."""

    in_parts = True

    def _backward(self, loss: Tensor) -> None:
        self.module.set_gradient_accumulation_boundary(self.accelerator.sync_gradients)
        self.module.backward(loss)

    def _clip(self, limit: float | None) -> float | None:
        # The engine clips in its step, by the limit that it finds there.
        self.module.optimizer.clip_grad = limit or 0.0
        return float(self.module.optimizer.scaled_global_norm())

    def _step(self, skipped: bool) -> None:
        if skipped:
            raise NotImplementedError("an engine of DeepSpeed does not leave out a step")
        if self.accelerator.sync_gradients:
            self.module.step()

    def save_part(self, folder: Path) -> None:
        """Write this process's part of the optimizer."""
        path = self._part(folder)
        path.parent.mkdir(exist_ok=True)
        torch.save(self._own_optimizer.state_dict(), path)

    @torch.no_grad()
    def load_part(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Go on from the weights of a checkpoint and this process's part of its optimizer."""
        self._copy(weights)
        self.module.optimizer.refresh_fp32_params()
        self._own_optimizer.load_state_dict(torch.load(self._part(folder), map_location="cpu", weights_only=True))

    def finish(self) -> None:
        """Let go of the engine, which holds on to the network's parameters and keeps their values in one tensor."""
        self.module.optimizer.destroy()
        for parameter in self.trained.values():
            parameter.data = parameter.data.clone()

    @property
    def _own_optimizer(self) -> Any:
        """The plain optimizer of this process's part."""
        return self.module.optimizer.optimizer

    def _part(self, folder: Path) -> Path:
        return folder / PARTS / f"part-{self.accelerator.process_index:05d}.pt"
