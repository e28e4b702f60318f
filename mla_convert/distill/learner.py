"""A network under training: its loss, its optimizer, and one optimizer step over several micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .data import Batch
from .runtime import StageModule
from .sharding import forget_gathered, is_sharded, whole


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW (arXiv 1711.05101) or Adafactor (arXiv 1804.04235); `betas` and `epsilon` are those of AdamW.

    `fused` AdamW needs no memory beside its state; torch's loss scaler skips steps in another way with it.
    """

    kind: str
    learning_rate: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    fused: bool = False

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        rate, decay = self.learning_rate, self.weight_decay
        if self.kind == "adafactor":
            return torch.optim.Adafactor(parameters, lr=rate, weight_decay=decay)
        more = {"fused": True} if self.fused else {}
        return torch.optim.AdamW(parameters, lr=rate, betas=self.betas, eps=self.epsilon, weight_decay=decay, **more)


class Judge(Protocol):
    """Called with the loss and the gradient norm of a step before it is taken; None is an fp16 overflow.

    What it returns goes into the step's row; with `skipped` the step is left out. It raises where
    training has to end.
    """

    def __call__(self, loss: float, grad_norm: float | None, /) -> dict[str, Any]: ...


class Learner:
    """The `trained` parameters, by name, of the network in `module`, with an optimizer of their own."""

    in_parts = False
    """Whether `own_optimizer` is a part of the optimizer, another one in each process."""

    def __init__(
        self, accelerator: Accelerator, module: StageModule, trained: Iterable[str], settings: OptimizerSettings
    ) -> None:
        self.accelerator, self.name, self.network = accelerator, module.name, module.network
        self.learning_rate = settings.learning_rate
        names = list(trained)
        optimizer = settings.build(module.network.get_parameter(name) for name in names)
        self.module: Any
        self.optimizer: Any
        if is_sharded(module.network):
            # The network is the root of its shards; in those of a wrapper it could only be called through that.
            self.module, self.optimizer = module, accelerator.prepare_optimizer(optimizer)
        else:
            self.module, self.optimizer = accelerator.prepare(module, optimizer)
        # Sharding puts other parameters in the place of those that were there.
        self.trained: dict[str, nn.Parameter] = {name: module.network.get_parameter(name) for name in names}

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(models, *arguments)` in the way in which losses are computed."""
        return self.module(function, *arguments)

    @torch.no_grad()
    def measure(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`call` without gradients; every process has to take part."""
        try:
            return self.call(function, *arguments)
        finally:
            forget_gathered(self.module)

    def update(
        self,
        loss_of: Callable[..., tuple[Tensor, dict[str, Tensor]]],
        draw: Callable[[torch.Generator], Batch],
        generators: Iterable[torch.Generator],
        rate: float,
        max_grad_norm: float | None,
        judge: Judge,
    ) -> dict[str, Any]:
        """One optimizer step at learning rate `rate`, a micro-batch that `draw` gives for each of `generators`.

        Returns the loss and what it logs, means over micro-batches and processes, `grad_norm`, and what
        `judge` says.
        """
        generators = list(generators)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums: dict[str, Tensor] = {}
        row: dict[str, Any] = {}
        for generator in generators:
            batch = draw(generator)
            with self.accelerator.accumulate(self.module):
                loss, logs = self.call(loss_of, batch, generator)
                self._backward(loss)
                for name, value in {"loss": loss.detach(), **logs}.items():
                    sums[name] = sums.get(name, torch.zeros_like(value)) + value / len(generators)
                if self.accelerator.sync_gradients:
                    means = self._mean(sums)
                    if not math.isfinite(means["loss"]):
                        judge(means["loss"], None)
                    norm = self._clip(max_grad_norm)
                    row = {**means, "grad_norm": norm, **judge(means["loss"], norm)}
                self._step(bool(row.get("skipped")))
        return row

    def _backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def _step(self, skipped: bool) -> None:
        """Move the weights where gradients are complete, unless the step is `skipped`, and forget the gradients."""
        if not skipped:
            self.optimizer.step()
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self.optimizer.zero_grad()

    def _clip(self, limit: float | None) -> float | None:
        """Norm of the gradient before clipping; None where fp16 overflowed and the loss scaler skips the step."""
        norm = float(whole(self.accelerator.clip_grad_norm_(self.trained.values(), limit or math.inf)))
        return None if self.accelerator.scaler is not None and not math.isfinite(norm) else norm

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
        """Go on from a checkpoint's weights and the state of `own_optimizer`."""
        for name, parameter in self.trained.items():
            parameter.copy_(weights[name])
        self.own_optimizer.load_state_dict(optimizer)

    @property
    def own_optimizer(self) -> Any:
        """What holds this process's state of the optimizer."""
        return self.optimizer

    def finish(self) -> None:
        """Leave the network's parameters as plain as they were."""
