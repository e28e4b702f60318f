"""What the model of a rollout is conditioned on beside its text: one tensor for the whole video, or one by frames.

A model declares its conditions in `condition_kinds` and those that it cannot run without in `needed_conditions`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError

FramesAt = Callable[[int, int], Tensor]
Given = Mapping[str, Tensor | FramesAt]

CLIP = ("latents", "encoder_hidden_states")
"""What every clip has; all else that it has is a condition, under the name by which models take it."""


class Conditions:
    """The conditions of a rollout of `models`, chunk by chunk, for a batch of `batch` items.

    `given` has them by name. A fixed one is a tensor `[B or 1, ...]`. One by frames is `[B or 1, c, F, H, W]` for the
    whole video of `frames` frames, or a function of (first, stop) that gives those of the frames from `first` to
    before `stop`; it is asked once a chunk, in their order, and may go on for ever. `size` is (H, W) of the latent.

    Raises UsageError for a condition that a model lacks or does not have, and for shapes that do not fit.
    """

    def __init__(
        self, models: Sequence[Any], given: Given | None, batch: int, frames: int | None, size: tuple[int, int]
    ) -> None:
        self.given, self.batch, self.size = dict(given or {}), batch, size
        # What a model reads beside the latent that it makes.
        self.channels = models[0].config.in_channels - models[0].noise_channels
        self.needed = models[0].needed_conditions
        self.kinds: Mapping[str, str] = models[0].condition_kinds
        self._made: tuple[tuple[int, int], dict[str, Tensor]] | None = None
        unknown = next((name for name in self.given if name not in self.kinds), None)
        if unknown is not None:
            known = ", ".join(self.kinds) or "none"
            raise UsageError(f"{type(models[0]).__name__} has no condition {unknown}; those that it has: {known}")
        check_conditions(models, self.given)
        for name, value in self.given.items():
            if isinstance(value, Tensor):
                self._check(name, value, frames)
            elif self.kinds[name] == "fixed":
                raise UsageError(f"the condition {name} is the same for the whole video; give a tensor, not a function")

    def at(self, first: int, stop: int) -> dict[str, Tensor]:
        """All conditions of the frames from `first` to before `stop`, `[B, ...]` each.

        Asked again for the same frames it gives the same tensors.
        """
        if self._made is None or self._made[0] != (first, stop):
            self._made = (first, stop), {name: self._of(name, first, stop) for name in self.given}
        return self._made[1]

    def _of(self, name: str, first: int, stop: int) -> Tensor:
        value = self.given[name]
        if not isinstance(value, Tensor):
            value = value(first, stop)
            self._check(name, value, stop - first)
        elif self.kinds[name] == "frames":
            value = value[:, :, first:stop]
        return value.expand(self.batch, *value.shape[1:])

    def _check(self, name: str, value: Tensor, frames: int | None) -> None:
        shape = list(value.shape)
        if not shape or shape[0] not in (1, self.batch):
            raise UsageError(f"the condition {name} has shape {shape}; it begins with the batch, {self.batch} or 1")
        if self.kinds[name] == "fixed":
            return
        if value.ndim != 5 or tuple(shape[3:]) != self.size:
            height, width = self.size
            raise UsageError(f"the condition {name} has shape {shape}; [B, c, F, {height}, {width}] is expected")
        if name in self.needed and shape[1] != self.channels:
            raise UsageError(f"the condition {name} has {shape[1]} channels, the model reads {self.channels}")
        if frames is None:
            raise UsageError(f"the condition {name} has {shape[2]} frames and the video no end; give a function")
        if shape[2] < frames:
            raise UsageError(f"the condition {name} has {shape[2]} frames, {frames} are needed; give more")


def conditions_of(clip: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a clip, or a batch of clips, has beside latents and text."""
    return {name: value for name, value in clip.items() if name not in CLIP}


def first_frames(model: Any, conditions: Mapping[str, Tensor], frames: int) -> dict[str, Tensor]:
    """Those by frames cut to the first `frames` of them, the others as they are."""
    return {
        name: value[:, :, :frames] if model.condition_kinds[name] == "frames" else value
        for name, value in conditions.items()
    }


def check_conditions(models: Sequence[Any], given: Mapping[str, Any]) -> None:
    """Raise UsageError unless `given` has all conditions that one of `models` needs."""
    missing = next((name for model in models for name in model.needed_conditions if name not in given), None)
    if missing is not None:
        raise UsageError(
            f"the model is conditioned on an image and {missing} is not given; give one with image= or --image, or "
            "what `image_conditions` makes of it as conditions="
        )


def placed(conditions: Sequence[Mapping[str, Tensor]], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """`conditions` one behind the other in the batch, on `device`; in `dtype` unless they are whole numbers."""

    def here(x: Tensor) -> Tensor:
        return x.to(device, dtype) if x.is_floating_point() else x.to(device)

    return {name: torch.cat([here(one[name]) for one in conditions]) for name in conditions[0]}
