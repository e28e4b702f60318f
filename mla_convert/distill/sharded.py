"""Trains a network whose weights, gradients, optimizer and average are sharded over the processes (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from .learner import AVERAGE_STEPS, Learner
from .runtime import StageModule
from .sharding import forget_gathered, frozen_shards, gather, is_sharded, load_shards, save_shards, trainable_shards
from .views import apart


class ShardedLearner(Learner):
    """A learner that trains a sharded copy of the student, which itself stays a plain model in host memory."""

    parts = True

    def _prepared(self, module: StageModule, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        if is_sharded(module.network):
            # The network is its own FSDP root; if Accelerate sharded the wrapper, only the wrapper could be called.
            return module, self.accelerator.prepare_optimizer(optimizer)
        return super()._prepared(module, optimizer)

    @staticmethod
    def network_of(student: Any) -> Any:
        return apart(student)

    def copy_to_train(self, source: Any) -> Any:
        return trainable_shards(source, self._mesh)

    def start_of(self, student: Any) -> Any:
        return frozen_shards(student, self._mesh)

    def average_of(self, student: Any) -> Any:
        assert self.average is not None
        self.average.replica = frozen_shards(student, self._mesh)
        return self.average.replica

    @property
    def _mesh(self) -> DeviceMesh:
        """The mesh of processes over which the network is sharded."""
        trained: Any = next(iter(self.trained.values()))
        return trained.device_mesh

    def measure(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return super().measure(function, *arguments)
        finally:
            forget_gathered(self.module)

    def save(self, folder: Path) -> dict[str, Any]:
        average = None if self.average is None else self.average.weights
        save_shards(folder / self.place.shards, self.module, self.optimizer.optimizer, average)
        return self._average_steps()

    def load(self, folder: Path, kept: Mapping[str, Any]) -> None:
        average = None if self.average is None else self.average.weights
        load_shards(folder / self.place.shards, self.module, self.optimizer.optimizer, average)
        if self.average is not None:
            self.average.loaded(kept[AVERAGE_STEPS])

    def finish(self, student: Any) -> None:
        super().finish(student)
        gather(self.weights(), student)
