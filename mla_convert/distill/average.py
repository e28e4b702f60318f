"""Maintains the exponential moving average of the student's trained weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from .sharding import own_part


class Average:
    """Averages of `trained` parameters by name; the tensors in `weights` are updated in place.

    The first average is the weights after the first step. With `warmup`, the decay then rises to `decay`.

    An optional `replica`, a model sharded like the trained one, receives a copy of every new average.
    """

    replica: nn.Module | None = None

    def __init__(self, trained: dict[str, nn.Parameter], decay: float, warmup: bool = True) -> None:
        self.trained, self.decay, self.warmup = trained, decay, warmup
        self.weights: dict[str, Tensor] = {name: parameter.detach().clone() for name, parameter in trained.items()}
        self.steps = 0
        """The number of updates of the average."""

    @torch.no_grad()
    def step(self) -> None:
        """Update the average with the trained weights."""
        self.steps += 1
        torch._foreach_lerp_(_own_parts(self.weights.values()), _own_parts(self.trained.values()), 1 - self._decay())
        self._refresh()

    def _decay(self) -> float:
        """The share of the old average in the update number `steps`."""
        if self.steps == 1:
            return 0.0
        return min(self.decay, self.steps / (9 + self.steps)) if self.warmup else self.decay

    @torch.no_grad()
    def copy_to_trained(self) -> None:
        """Overwrite the trained weights with the average."""
        torch._foreach_copy_(_own_parts(self.trained.values()), _own_parts(self.weights.values()))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Swap the averaged weights into the student inside the context; `weights` has the trained ones meanwhile."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange average and trained weights, with the memory of one more tensor."""
        for name, average in self.weights.items():
            mine, trained = own_part(average), own_part(self.trained[name])
            kept = trained.clone()
            trained.copy_(mine)
            mine.copy_(kept)

    def loaded(self, steps: int) -> None:
        """Set the number of updates, after a checkpoint was read into `weights` in place."""
        self.steps = steps
        self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        if self.replica is not None:
            for name, average in self.weights.items():
                self.replica.get_parameter(name).copy_(average)


def _own_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [own_part(tensor) for tensor in tensors]
