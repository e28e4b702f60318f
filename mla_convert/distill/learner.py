"""Trains one network: calls its loss, owns its optimizer, and takes an optimizer step over several micro-batches."""

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
    """Settings of AdamW (arXiv 1711.05101) or Adafactor (arXiv 1804.04235); only AdamW uses `betas` and `epsilon`.

    `fused` AdamW allocates nothing beyond its state. PyTorch's loss scaler skips steps differently with it.
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
    """Called before an optimizer step, with its loss and gradient norm; the norm is None after an fp16 overflow.

    The returned entries go into the step's row; with `skipped` set, the step is not taken. Raises if
    training must end.
    """

    def __call__(self, loss: float, grad_norm: float | None, /) -> dict[str, Any]: ...


class Learner:
    """The `trained` parameters, by name, of the network in `module`, with an optimizer of their own."""

    partitioned = False
    """Whether `own_optimizer` holds only this process's partition of the optimizer."""

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
            # The network is its own FSDP root; if Accelerate sharded the wrapper, only the wrapper could be called.
            self.module, self.optimizer = module, accelerator.prepare_optimizer(optimizer)
        else:
            self.module, self.optimizer = accelerator.prepare(module, optimizer)
        # Sharding replaces the parameters, so they are looked up again.
        self.trained: dict[str, nn.Parameter] = {name: module.network.get_parameter(name) for name in names}

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return `function(models, *arguments)`, run as losses are: in the wrapped module, under its autocast."""
        return self.module(function, *arguments)

    @torch.no_grad()
    def measure(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return `call` without gradients; every process must take part."""
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
        """Take one optimizer step at learning rate `rate`; `draw` makes one micro-batch for each of `generators`.

        Returns the loss and its logged scalars (means over micro-batches and processes), `grad_norm`, and the
        entries from `judge`.
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
        """Update the weights once gradients are complete, unless the step is `skipped`, and clear the gradients."""
        if not skipped:
            self.optimizer.step()
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self.optimizer.zero_grad()

    def _clip(self, limit: float | None) -> float | None:
        """Clip the gradient and return its norm before; None if fp16 overflowed and the loss scaler skips the step."""
        norm = float(whole(self.accelerator.clip_grad_norm_(self.trained.values(), limit or math.inf)))
        return None if self.accelerator.scaler is not None and not math.isfinite(norm) else norm

    def _mean(self, values: dict[str, Tensor]) -> dict[str, float]:
        """The mean of each value over the processes."""
        names = list(values)
        reduced: Tensor = self.accelerator.reduce(torch.stack([values[name] for name in names]), "mean")
        return dict(zip(names, reduced.tolist(), strict=True))

    def weights(self) -> dict[str, Tensor]:
        """The trained tensors by name."""
        return {name: parameter.data for name, parameter in self.trained.items()}

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
        """Restore a checkpoint's weights and the state of `own_optimizer`."""
        for name, parameter in self.trained.items():
            parameter.copy_(weights[name])
        self.own_optimizer.load_state_dict(optimizer)

    @property
    def own_optimizer(self) -> Any:
        """The object that holds this process's optimizer state."""
        return self.optimizer

    def finish(self) -> None:
        """Restore plain parameters at the end of training; a subclass with an engine overrides this."""
