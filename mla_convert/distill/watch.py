"""Detects loss spikes and plateaus from the history of a stage's losses."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .keys import SpikeConfig, StopConfig
from .sharding import over_parts, own_part


class Watch:
    """Recent losses by network, and the best held-out loss. They are equal in all processes and checkpointed."""

    def __init__(self, spike: SpikeConfig | None, stop: StopConfig | None) -> None:
        self.spike, self.stop = spike, stop
        self.losses: dict[str, list[float]] = {}
        self.best: float | None = None
        self.stale = 0

    def spike_of(self, network: str, loss: float) -> float | None:
        """`loss` divided by the running median if it is a spike, else None; it is recorded either way.

        A loss that stays high becomes the median, so that `skip` cannot skip forever.
        """
        if self.spike is None:
            return None
        recent = self.losses.setdefault(network, [])
        median = statistics.median(recent) if len(recent) == self.spike.window else None
        self.losses[network] = [*recent, loss][-self.spike.window :]
        if median is None or median <= 0 or loss <= self.spike.factor * median:
            return None
        return loss / median

    def heldout(self, loss: float) -> None:
        """Record the held-out loss of an evaluation."""
        if self.stop is None:
            return
        if self.best is None or loss < (1 - self.stop.min_delta) * self.best:
            self.best, self.stale = loss, 0
        else:
            self.stale += 1

    @property
    def plateau(self) -> bool:
        """Whether the stopping rule ends the stage."""
        return self.stop is not None and self.stale >= self.stop.patience

    def state(self) -> dict[str, Any]:
        """The recorded losses as JSON values."""
        return {"losses": self.losses, "best": self.best, "stale": self.stale}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.losses, self.best, self.stale = dict(state["losses"]), state["best"], state["stale"]


@torch.no_grad()
def relative_distance(weights: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """`|w - w'| / |w|`, the Euclidean norm over all tensors; they may be sharded, all in the same way."""
    parts = [(own_part(weight), own_part(others[name])) for name, weight in weights.items()]
    # One difference at a time, because all together would be a third copy of the weights.
    norms = [torch.stack([torch.linalg.vector_norm(x) for x in (weight - other, weight)]) for weight, other in parts]
    apart, size = over_parts(torch.stack(norms).square().sum(0), next(iter(weights.values()))).sqrt()
    return float(apart / size.clamp_min(1e-30))
