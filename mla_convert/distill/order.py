"""Assigns training examples to micro-batches, and numbers the micro-batches of a stage.

A micro-batch has one number in the whole stage, counted over steps, accumulation and processes:
`(step * grad_accumulation + micro_step) * processes + rank`. Data and noise depend only on this number,
the seed and the stage. So a run can stop anywhere and resume, and N processes see the same clips as one
process with N times the accumulation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..draws import Use, drawn


class DataOrder:
    """The example index at every position of an endless pass over `size` examples, reshuffled each epoch.

    If `size` is None, the supply is endless: position and index are the same.
    """

    def __init__(self, size: int | None, seed: int, stage_index: int) -> None:
        self.size, self.seed, self.stage_index = size, seed, stage_index
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long)

    def index(self, position: int) -> int:
        """The index of the example at `position`."""
        if self.size is None:
            return position
        epoch, offset = divmod(position, self.size)
        if epoch != self._epoch:
            generator = drawn(Use.ORDER, self.seed, self.stage_index, epoch)
            self._epoch, self._permutation = epoch, torch.randperm(self.size, generator=generator)
        return int(self._permutation[offset])


@dataclass(frozen=True)
class MicroBatches:
    """A batch sampler: the example indices of one process's micro-batches, from step `first` up to `last`."""

    order: DataOrder
    batch_size: int
    grad_accumulation: int
    processes: int
    rank: int
    first: int
    last: int

    def __iter__(self) -> Iterator[list[int]]:
        for micro in range(self.first * self.grad_accumulation, self.last * self.grad_accumulation):
            start = (micro * self.processes + self.rank) * self.batch_size
            yield [self.order.index(position) for position in range(start, start + self.batch_size)]

    def __len__(self) -> int:
        return (self.last - self.first) * self.grad_accumulation
