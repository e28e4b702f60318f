"""Supplies a rollout with its conditions other than text: tensors for the whole video, or one slice per chunk.

A model declares its conditions in `condition_kinds`, and the required ones in `needed_conditions`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from .model import StreamingModel

FramesAt = Callable[[int, int], Tensor]
Given = Mapping[str, Tensor | FramesAt]

CLIP = ("latents", "encoder_hidden_states")
"""The entries of every clip; all other entries are conditions, named as in the model's forward."""


class Conditions:
    """The conditions of a rollout of `models`, chunk by chunk, for a batch of `batch` items.

    `given` maps names to conditions. A `fixed` condition is a tensor `[B or 1, ...]`. A `frames` condition is
    `[B or 1, c, F, H, W]` for the whole video of `frames` frames, or a function of (first, stop) that returns the
    frames `[first, stop)`. The function is called once per chunk, in order, and need not end. `size` is (H, W) of the
    latent.

    Raises UsageError for a missing required condition, for one that the models do not declare, and for shapes that do
    not fit.
    """

    def __init__(
        self,
        models: Sequence[StreamingModel],
        given: Given | None,
        batch: int,
        frames: int | None,
        size: tuple[int, int],
    ) -> None:
        self.given, self.batch, self.size = dict(given or {}), batch, size
        # Channels that a model reads in addition to the noisy latent.
        self.channels = models[0].config.in_channels - models[0].noise_channels
        self.needed = models[0].needed_conditions
        self.kinds: Mapping[str, str] = models[0].condition_kinds
        self._made: tuple[tuple[int, int], dict[str, Tensor]] | None = None
        unknown = next((name for name in self.given if name not in self.kinds), None)
        if unknown is not None:
            declared = ", ".join(self.kinds) or "none"
            raise UsageError(f"{type(models[0]).__name__} has no condition {unknown}; its conditions: {declared}")
        check_conditions(models, self.given)
        for name, value in self.given.items():
            if isinstance(value, Tensor):
                self._check(name, value, frames)
            elif self.kinds[name] == "fixed":
                raise UsageError(f"the condition {name} is the same for the whole video; give a tensor, not a function")

    def at(self, first: int, stop: int) -> dict[str, Tensor]:
        """All conditions of the frames `[first, stop)`, each `[B, ...]`.

        A second call for the same frames returns the same tensors.
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
            raise UsageError(f"the condition {name} has shape {shape}; its batch must be {self.batch} or 1")
        if self.kinds[name] == "fixed":
            return
        if value.ndim != 5 or tuple(shape[3:]) != self.size:
            height, width = self.size
            raise UsageError(f"the condition {name} has shape {shape}; [B, c, F, {height}, {width}] is expected")
        if name in self.needed and shape[1] != self.channels:
            raise UsageError(f"the condition {name} has {shape[1]} channels; the model reads {self.channels}")
        if frames is None:
            raise UsageError(f"the condition {name} has {shape[2]} frames, but the video has no end; give a function")
        if shape[2] < frames:
            raise UsageError(f"the condition {name} has {shape[2]} frames, {frames} are needed; give more")


def conditions_of(clip: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a clip, or of a batch of clips, other than latents and text."""
    return {name: value for name, value in clip.items() if name not in CLIP}


def first_frames(model: StreamingModel, conditions: Mapping[str, Tensor], frames: int) -> dict[str, Tensor]:
    """`conditions` with those of kind `frames` cut to their first `frames` frames; the others are unchanged."""
    return {
        name: value[:, :, :frames] if model.condition_kinds[name] == "frames" else value
        for name, value in conditions.items()
    }


def check_conditions(models: Sequence[StreamingModel], given: Mapping[str, Any]) -> None:
    """Raise UsageError unless `given` has every condition that one of `models` requires."""
    missing = next((name for model in models for name in model.needed_conditions if name not in given), None)
    if missing is not None:
        raise UsageError(
            f"the model is conditioned on an image, but {missing} is missing; pass image= or --image, or the result of "
            "`image_conditions` as conditions="
        )


def placed(conditions: Sequence[Mapping[str, Tensor]], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """`conditions` concatenated along the batch, on `device`; in `dtype` unless they are integers."""

    def moved(x: Tensor) -> Tensor:
        return x.to(device, dtype) if x.is_floating_point() else x.to(device)

    return {name: torch.cat([moved(one[name]) for one in conditions]) for name in conditions[0]}
