"""Supplies the clean video that a rollout restyles, of any length, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..errors import UsageError
from ..mla.conditions import FramesAt

NO_FRAMES = "the source has no frames"
ALONE = "a source already determines the first frames; give source or start, not both"


class CleanVideo:
    """The clean latents that a rollout of `shape` (C, H, W) restyles, for a batch of `batch` items.

    `given` is the whole video, `[B or 1, C, F, H, W]`, or a function of (first, stop) that returns the frames
    `[first, stop)`. The function is called once per chunk, in order; the video ends where it returns fewer frames.

    Raises UsageError for a tensor that does not fit or has no frames.
    """

    def __init__(self, given: Tensor | FramesAt, batch: int, shape: tuple[int, int, int]) -> None:
        self.given, self.batch, self.shape = given, batch, shape
        if isinstance(given, Tensor):
            self._check(given)
            if given.shape[2] == 0:
                raise UsageError(NO_FRAMES)

    def at(self, first: int, stop: int, device: torch.device | None = None) -> Tensor:
        """The frames `[first, stop)`, or those that are left: `[B, C, F, H, W]`, float32, where given or on `device`.

        Raises UsageError for latents that do not fit.
        """
        if isinstance(self.given, Tensor):
            found = self.given[:, :, first:stop]
        else:
            found = self.given(first, stop)
            self._check(found)
        if found.shape[2] > stop - first:
            raise UsageError(f"the source returned {found.shape[2]} frames; at most {stop - first} were requested")
        return found.to(device=device, dtype=torch.float32).expand(self.batch, -1, -1, -1, -1)

    def _check(self, found: Tensor) -> None:
        shape = list(found.shape)
        if len(shape) != 5 or shape[0] not in (1, self.batch) or (shape[1], *shape[3:]) != self.shape:
            channels, height, width = self.shape
            batch = "1" if self.batch == 1 else f"{self.batch} or 1"
            raise UsageError(f"the source has shape {shape}; [{batch}, {channels}, F, {height}, {width}] is expected")


def shortest(frames: int | None, source: object) -> int | None:
    """The length of a rollout of at most `frames` frames with `source`, if latents `[B, C, F, H, W]` fix its length."""
    lengths = [frames, source.shape[2] if isinstance(source, Tensor) else None]
    return min((length for length in lengths if length is not None), default=None)


def check_alone(start: Tensor | None) -> None:
    """Raise UsageError for a `start` together with a source."""
    if start is not None:
        raise UsageError(ALONE)


def with_source(
    ranges: Iterable[tuple[int, int]], source: CleanVideo | None, device: torch.device
) -> Iterator[tuple[int, int, Tensor | None]]:
    """Yield the frame range of each chunk and its clean source chunk `[B, C, F, H, W]`, until the source ends.

    Without a source, yields all `ranges` with None. Raises UsageError for a source without frames.
    """
    for first, stop in ranges:
        clean = None if source is None else source.at(first, stop, device)
        end = stop if clean is None else first + clean.shape[2]
        if end == 0:
            raise UsageError(NO_FRAMES)
        if end > first:
            yield first, end, clean
        if end < stop:
            return
