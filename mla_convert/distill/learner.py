"""A network under training: its loss, its optimizer, and one optimizer step over several micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .data import Batch
from .runtime import StageModule

RequireFinite = Callable[[str, float], None]


class Learner:
    """The `trained` parameters, by name, of the network in `module`, with an AdamW of their own.

    `updates` is the number of optimizer steps that it takes in a step of the stage.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        module: StageModule,
        trained: dict[str, nn.Parameter],
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
        updates: int = 1,
    ) -> None:
        self.accelerator, self.trained, self.updates = accelerator, trained, updates
        self.name, self.learning_rate = module.name, learning_rate
        optimizer = torch.optim.AdamW(trained.values(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
        self.module, self.optimizer = accelerator.prepare(module, optimizer)

    def update(
        self,
        batches: Iterator[Batch],
        generators: Iterable[torch.Generator],
        rate: float,
        max_grad_norm: float | None,
        require_finite: RequireFinite,
    ) -> dict[str, float | None]:
        """One optimizer step at learning rate `rate`, a micro-batch for each of `generators`.

        Returns the loss and what it logs, means over micro-batches and processes, and `grad_norm`.
        """
        generators = list(generators)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums: dict[str, Tensor] = {}
        row: dict[str, float | None] = {}
        for generator in generators:
            with self.accelerator.accumulate(self.module):
                loss, logs = self.module(next(batches), generator)
                self.accelerator.backward(loss)
                for name, value in {"loss": loss.detach(), **logs}.items():
                    sums[name] = sums.get(name, torch.zeros_like(value)) + value / len(generators)
                if self.accelerator.sync_gradients:
                    means = self._mean(sums)
                    require_finite("loss", means["loss"])
                    row = {**means, "grad_norm": self._clip(max_grad_norm, require_finite)}
                self.optimizer.step()
                self.optimizer.zero_grad()
        return row

    def _clip(self, limit: float | None, require_finite: RequireFinite) -> float | None:
        """Norm of the gradient before clipping; None where fp16 overflowed and the loss scaler skips the step."""
        norm = float(self.accelerator.clip_grad_norm_(self.trained.values(), limit or math.inf))
        if self.accelerator.scaler is None:
            require_finite("gradient norm", norm)
        return norm if math.isfinite(norm) else None

    def _mean(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Mean of each value over the processes."""
        names = list(values)
        reduced: Tensor = self.accelerator.reduce(torch.stack([values[name] for name in names]), "mean")
        return dict(zip(names, reduced.tolist(), strict=True))

    def weights(self) -> dict[str, Tensor]:
        """The trained tensors by name."""
        return {name: parameter.data for name, parameter in self.trained.items()}

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
        """Go on from a checkpoint's weights and optimizer state."""
        for name, parameter in self.trained.items():
            parameter.copy_(weights[name])
        self.optimizer.load_state_dict(optimizer)
