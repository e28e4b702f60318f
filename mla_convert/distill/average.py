"""Maintains the exponential moving average of the student's trained weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn


class Average:
    """Averages of `trained` parameters by name; the tensors in `weights` are updated in place.

    The first average is the weights after the first step. With `warmup`, the decay then rises to `decay`.

    An optional `replica`, a model sharded like the trained one, receives a copy of every new average.
    """

    replica: nn.Module | None = None

    def __init__(self, trained: dict[str, nn.Parameter], decay: float, warmup: bool = True) -> None:
        self.trained = trained
        self._model = EMAModel(trained.values(), decay=decay, min_decay=0.0 if warmup else decay)
        self.weights: dict[str, Tensor] = dict(zip(trained, self._model.shadow_params, strict=True))

    @property
    def steps(self) -> int:
        """The number of updates of the average."""
        return int(self._model.optimization_step)

    def step(self) -> None:
        """Update the average with the trained weights."""
        self._model.step(self.trained.values())
        self._refresh()

    def copy_to_trained(self) -> None:
        """Overwrite the trained weights with the average."""
        self._model.copy_to(self.trained.values())

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Swap the averaged weights into the student inside the context."""
        self._model.store(self.trained.values())
        self.copy_to_trained()
        try:
            yield
        finally:
            self._model.restore(self.trained.values())

    def loaded(self, steps: int) -> None:
        """Set the number of updates, after a checkpoint was read into `weights` in place."""
        self._model.optimization_step = steps
        self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        if self.replica is not None:
            for name, average in self.weights.items():
                self.replica.get_parameter(name).copy_(average)
