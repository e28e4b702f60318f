"""Runs the passes of a model, or of its experts, over a chunk of one stream or of several streams that share them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..denoise import Schedule, StepDone, denoise
from ..flow import NUM_TRAIN_TIMESTEPS, add_noise, expert_at
from ..mla.model import StreamingModel


class Passes(ABC):
    """Passes of `models`: a single model, or experts that share the noise levels by `noise_range` (Wan2.2)."""

    def __init__(self, models: Sequence[StreamingModel]) -> None:
        self.models = list(models)
        self.used = 0

    @abstractmethod
    def _run(self, expert: int, x: Tensor, levels: tuple[float, float], held: int, write: bool) -> Tensor:
        """An expert's output for a chunk `x` `[B, C, F, H, W]`, followed by its output for negative prompts."""

    @abstractmethod
    def _guided(self, v: Tensor, batch: int) -> Tensor:
        """The guided velocities of `batch` items from the output of `_run`."""

    def chunk(
        self,
        noises: Sequence[Tensor],
        schedule: Schedule,
        first: int,
        held: Tensor | None = None,
        on_step: StepDone | None = None,
    ) -> Tensor:
        """The chunk that begins at frame `first`, `[B, C, F, H, W]`, float32; `keep` has still to write it.

        `noises` holds `schedule.draws` tensors, the first from `schedule.begin`. `held` `[B, C, F0, H, W]` are given
        first frames of the chunk; if they cover it, no step is taken.
        """
        if held is not None and held.shape[2] == noises[0].shape[2]:
            x = held
        else:
            clean = 0 if held is None else held.shape[2]

            def velocity(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
                return self.velocity(x, float(t), float(r), clean)

            x = denoise(noises[0], schedule.of_chunk(first), velocity, schedule.between(noises), held, on_step)
        return x

    def keep(self, x: Tensor, noises: Sequence[Tensor], schedule: Schedule) -> Tensor:
        """Write a finished chunk to the cache, from which the next one reads it; returns it as written.

        `noises` are those of `chunk`, the last of which is that of `schedule.context_noise`.
        """
        written = x
        if schedule.context_noise > 0:
            written = add_noise(x, noises[-1], torch.full((len(x),), schedule.context_noise, device=x.device))
        self.write(written, schedule.context_noise)
        return written

    def velocity(self, x: Tensor, t: float, r: float, held: int = 0) -> Tensor:
        """Velocity `[B, C, F, H, W]`, float32, at noise level t; for a flow map the mean velocity from t to r.

        The first `held` frames are clean and have noise level 0.
        """
        self.used = expert_at([model.noise_range for model in self.models], t)
        return self._guided(self._run(self.used, x, (t, r), held, write=False).float().to(x.device), len(x))

    def write(self, x: Tensor, t: float) -> None:
        """Write a finished chunk at noise level t to the cache of every expert."""
        for expert in self.writers():
            self.write_to(expert, x, t)

    def writers(self) -> list[int]:
        """All experts, in the order in which they write."""
        # With offloading, the expert that is on the device comes first.
        return sorted(range(len(self.models)), key=lambda expert: expert != self.used)

    def write_to(self, expert: int, x: Tensor, t: float) -> None:
        """Write a finished chunk at noise level t to the cache of one expert."""
        self._run(expert, x, (t, t), held=0, write=True)
        self.used = expert


def run_pass(
    model: StreamingModel,
    call: Callable[..., Tensor],
    x: Tensor,
    levels: tuple[float, float],
    held: int,
    text: Tensor,
    conditions: Mapping[str, Tensor],
) -> Tensor:
    """The output of `call`, a pass of `model`, for a chunk `[B, C, F, H, W]` at noise level `levels[0]`.

    A flow map also gets `levels[1]`. The first `held` frames are clean and have noise level 0.
    """
    timestep, r_timestep = (_timestep(level, x, held) for level in levels)
    second = {"r_timestep": r_timestep} if model.flow_map else {}
    out = call(x, timestep, text, **conditions, **second)
    if model.kernels is not None:
        model.kernels.announce()
    return out


def _timestep(level: float, x: Tensor, held: int) -> Tensor:
    """A noise level as a timestep, float32 `[B]`, or `[B, F]` if the first `held` frames are at 0."""
    if not held:
        return torch.full((len(x),), level * NUM_TRAIN_TIMESTEPS, device=x.device)
    timestep = torch.full((len(x), x.shape[2]), level * NUM_TRAIN_TIMESTEPS, device=x.device)
    timestep[:, :held] = 0
    return timestep
