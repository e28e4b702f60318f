"""A stage under DeepSpeed's ZeRO-2 (arXiv 1910.02054): weights whole everywhere, gradients and optimizer in parts.

Weights stay float32 and autocast computes, as everywhere else, so the engine is told of no precision. Its step clips
and moves the weights at once; here the gradient's norm is asked for before it, so that a stage that diverges ends
with good weights. Each process has its part of the optimizer in a plain one, which a checkpoint keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .learner import Learner


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
        assert not skipped, "check_launch lets no stage come here that would skip a step"
        if self.accelerator.sync_gradients:
            self.module.step()

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
        """Go on from a checkpoint's weights and this process's part of its optimizer."""
        super().load(weights, optimizer)
        self.module.optimizer.refresh_fp32_params()

    def finish(self) -> None:
        """Let go of the engine, which holds on to the network's parameters and keeps their values in one tensor."""
        self.module.optimizer.destroy()
        for parameter in self.trained.values():
            parameter.data = parameter.data.clone()

    @property
    def own_optimizer(self) -> Any:
        """The plain optimizer of this process's part."""
        return self.module.optimizer.optimizer
