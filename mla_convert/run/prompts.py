"""Prompts that change while a video goes on."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from .decode import first_video_frame


class PromptChange(BaseModel):
    """From `seconds` of the video on it is told `prompt`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds: float = Field(ge=0, allow_inf_nan=False)
    prompt: str = Field(min_length=1)


class PromptSchedule:
    """The text at every chunk border, as `stream_chunks` asks for it.

    `changes` are seconds and texts `[B or 1, L, D]` in the order of time; a change takes effect with the
    first chunk that begins then or later. `temporal` is the number of video frames of a latent frame after the first.
    """

    def __init__(self, changes: Sequence[tuple[float, Tensor]], fps: float, temporal: int) -> None:
        self.changes, self.fps, self.temporal = list(changes), fps, temporal

    def __call__(self, frame: int) -> Tensor | None:
        """The text of a chunk that begins with latent `frame`, None where it stays."""
        now = first_video_frame(frame, self.temporal) / self.fps
        text = None
        while self.changes and self.changes[0][0] <= now:
            text = self.changes.pop(0)[1]
        return text
