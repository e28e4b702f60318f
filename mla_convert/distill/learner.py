"""Trains one network: owns its optimizer and its average, takes optimizer steps, and saves and restores itself."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .average import Average
from .data import Batch
from .feed import MicroBatch
from .runtime import StageModule
from .sharding import whole
from .state import Place, read_weights, write_weights
from .views import start_of, trainable_copy, with_weights

EMA, AVERAGE_STEPS = "ema.safetensors", "average_steps"


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


LossOf = Callable[[Mapping[str, Any], Batch, torch.Generator], tuple[Tensor, dict[str, Tensor]]]
"""The loss of a stage's student or second network, see `Stage.loss`."""


class Verdict(Protocol):
    """Called before an optimizer step, with its loss and gradient norm; the norm is None after an fp16 overflow.

    The returned entries go into the step's row; with `skipped` set, the step is not taken. Raises if
    training must end.
    """

    def __call__(self, loss: float, grad_norm: float | None, /) -> dict[str, Any]: ...


class Learner:
    """The `trained` parameters, by name, of the network in `module`, with an optimizer of their own.

    Here every process has all of the parameters and of the optimizer; in a subclass it has parts. `average`, if set,
    follows the parameters. `place` says where a checkpoint has them.
    """

    parts: ClassVar[bool | Literal["optimizer"]] = False
    """What is divided over the processes, as a checkpoint records it: everything (True), the optimizer or nothing."""
    any_processes: ClassVar[bool] = True
    """Whether another number of processes can continue from a checkpoint."""

    def __init__(
        self,
        accelerator: Accelerator,
        module: StageModule,
        trained: Iterable[str],
        settings: OptimizerSettings,
        place: Place,
    ) -> None:
        self.accelerator, self.name, self.network, self.place = accelerator, module.name, module.network, place
        self.learning_rate = settings.learning_rate
        names = list(trained)
        optimizer = settings.build(module.network.get_parameter(name) for name in names)
        self.module: Any
        self.optimizer: Any
        self.module, self.optimizer = self._prepared(module, optimizer)
        # Preparing may replace the parameters, so they are looked up again.
        self.trained: dict[str, nn.Parameter] = {name: module.network.get_parameter(name) for name in names}
        self.average: Average | None = None

    def _prepared(self, module: StageModule, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """The module and the optimizer as Accelerate wraps them."""
        prepared: tuple[Any, Any] = self.accelerator.prepare(module, optimizer)
        return prepared

    @staticmethod
    def network_of(student: Any) -> Any:
        """The network to train for `student`, whose weights `finish` leaves there: here the student itself."""
        return student

    def copy_to_train(self, source: Any) -> Any:
        """A float32 copy of the frozen model `source`, to be trained on its own beside this network."""
        return trainable_copy(source).to(self.accelerator.device)

    def start_of(self, student: Any) -> Any:
        """A frozen model of the weights of `student` as they are now."""
        return start_of(student, self.trained)

    def average_of(self, student: Any) -> Any:
        """A frozen model like `student` that always has the weights of `average`."""
        assert self.average is not None
        return with_weights(student, self.average.weights)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(models, *arguments)`, run as losses are: in the wrapped module, under its autocast."""
        return self.module(function, *arguments)

    @torch.no_grad()
    def measure(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`call` without gradients; every process must take part."""
        return self.call(function, *arguments)

    def measure_final(self, function: Callable[[Any], Any]) -> Any:
        """`function(network)`, as `measure` does, with the weights that `finish` would leave."""
        with contextlib.nullcontext() if self.average is None else self.average.in_place():
            return self.measure(lambda models: function(models[self.name]))

    def update(
        self,
        loss_of: LossOf,
        batches: Iterable[MicroBatch],
        rate: float,
        max_grad_norm: float | None,
        judge: Verdict,
    ) -> dict[str, Any]:
        """Take one optimizer step at learning rate `rate`, over as many `batches` as gradients are accumulated.

        Returns the loss and its logged scalars (means over micro-batches and processes), `grad_norm`, and the
        entries from `judge`.
        """
        micro_steps = self.accelerator.gradient_accumulation_steps
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums: dict[str, Tensor] = {}
        row: dict[str, Any] = {}
        for clips, generator in batches:
            with self.accelerator.accumulate(self.module):
                loss, logs = self.call(loss_of, clips, generator)
                self._backward(loss)
                for name, value in {"loss": loss.detach(), **logs}.items():
                    share = value / micro_steps
                    sums[name] = sums[name] + share if name in sums else share
                if self.accelerator.sync_gradients:
                    means = self._mean(sums)
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

    def save(self, folder: Path) -> dict[str, Any]:
        """Write this network's files of a checkpoint to `folder`; every process calls this.

        Returns its entries of the checkpoint's file of optimizers, which the first process writes.
        """
        if self.accelerator.is_main_process:
            write_weights(folder / self.place.weights, self.weights())
            if self.average is not None:
                write_weights(folder / EMA, self.average.weights)
        return self._save_optimizer(folder) | self._average_steps()

    def load(self, folder: Path, kept: Mapping[str, Any]) -> None:
        """Restore what `save` wrote; `kept` is the checkpoint's file of optimizers. Every process calls this."""
        read_weights(folder / self.place.weights, self.weights())
        self._load_optimizer(folder, kept)
        if self.average is not None:
            read_weights(folder / EMA, self.average.weights)
            self.average.loaded(kept[AVERAGE_STEPS])

    def _save_optimizer(self, folder: Path) -> dict[str, Any]:
        """The optimizer's share of what `save` does."""
        return {self.place.optimizer: self.optimizer.state_dict()}

    def _load_optimizer(self, folder: Path, kept: Mapping[str, Any]) -> None:
        """The optimizer's share of what `load` does, after the weights."""
        self.optimizer.load_state_dict(kept[self.place.optimizer])

    def _average_steps(self) -> dict[str, Any]:
        return {} if self.average is None else {AVERAGE_STEPS: self.average.steps}

    def finish(self, student: Any) -> None:
        """End training with the trained weights, or their average if there is one, in the plain model `student`."""
        if self.average is not None:
            self.average.copy_to_trained()
