"""Changes the prompt in the middle of a video."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..errors import UsageError
from .latents import first_video_frame


class PromptChange(BaseModel):
    """A prompt that applies from a time of the video on, in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds: float = Field(ge=0, allow_inf_nan=False)
    prompt: str = Field(min_length=1)


class PromptSchedule:
    """The `prompt_at` of `stream_chunks`: the new text at a chunk boundary, if any.

    `changes` are pairs of seconds and texts `[B or 1, L, D]`, ordered by time. A change takes effect with the first
    chunk that begins at that time or later. `temporal` is the number of video frames per latent frame after the first.
    """

    def __init__(self, changes: Sequence[tuple[float, Tensor]], fps: float, temporal: int) -> None:
        self.changes, self.fps, self.temporal = list(changes), fps, temporal

    def __call__(self, frame: int) -> Tensor | None:
        """The new text of the chunk that begins at latent `frame`; None if it does not change."""
        now = first_video_frame(frame, self.temporal) / self.fps
        text = None
        while self.changes and self.changes[0][0] <= now:
            text = self.changes.pop(0)[1]
        return text


def checked_embeds(name: str, embeds: Tensor, width: int, texts: Tensor | None = None) -> Tensor:
    """Embeddings `[B, L, width]`, or with `texts` `[B or 1, L, width]`. Raises UsageError if the shape does not fit."""
    embeds = embeds.unsqueeze(0) if embeds.ndim == 2 else embeds
    if embeds.ndim != 3 or embeds.shape[2] != width:
        raise UsageError(f"{name} have shape {list(embeds.shape)}; [B, L, {width}] is expected")
    if texts is not None and embeds.shape not in (texts.shape, (1, *texts.shape[1:])):
        raise UsageError(f"{name} have shape {list(embeds.shape)}, which does not fit prompts of {list(texts.shape)}")
    return embeds
