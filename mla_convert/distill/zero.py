"""Trains under DeepSpeed's ZeRO-2 (arXiv 1910.02054): full weights everywhere, gradients and optimizer partitioned.

Weights stay float32 under autocast, as everywhere else, so the engine gets no precision setting. Its step clips
and updates the weights at once. The gradient norm is therefore read before the step, so that a stage that diverges
keeps good weights. Each process has its partition in a plain optimizer, whose state goes into the checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .learner import Learner


class ZeroLearner(Learner):
    """A learner whose module is a DeepSpeed engine."""

    partitioned = True

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

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
        """Restore a checkpoint's weights and this process's partition of its optimizer."""
        super().load(weights, optimizer)
        self.module.optimizer.refresh_fp32_params()

    def finish(self) -> None:
        """Release the engine, which references the parameters and stores their values in one flat tensor."""
        self.module.optimizer.destroy()
        for parameter in self.trained.values():
            parameter.data = parameter.data.clone()

    @property
    def own_optimizer(self) -> Any:
        """The plain optimizer of this process's partition."""
        return self.module.optimizer.optimizer
