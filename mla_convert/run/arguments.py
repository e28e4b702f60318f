"""Checks and completes the arguments of a pipeline's call, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ..errors import RecipeError, UsageError
from ..explain import explain
from .config import GenerateConfig
from .latents import latent_frames, video_frames
from .sample import over_trained


def check_arguments(
    *,
    output_type: str,
    prompt: Any,
    prompt_embeds: Any,
    seed: Any,
    generator: Any,
    last_image: Any,
    num_videos_per_prompt: int,
) -> None:
    """Raise UsageError for arguments of `StreamingMLAPipeline.stream` that exclude each other or are out of range."""
    if output_type not in ("np", "pt", "pil", "latent"):
        raise UsageError(f"output_type must be np, pt, pil or latent, not {output_type!r}")
    if (prompt is None) == (prompt_embeds is None):
        raise UsageError("give either prompt or prompt_embeds")
    if seed is not None and generator is not None:
        raise UsageError("give seed or generator, not both")
    if last_image is not None:
        raise UsageError("last_image is not supported, because a streamed video has no fixed end; leave it out")
    if num_videos_per_prompt < 1:
        raise UsageError(f"num_videos_per_prompt must be at least 1, not {num_videos_per_prompt}")


def sampling_settings(
    requested: Mapping[str, Any], trained: Mapping[str, Any], digits: bool, source: Any = None, start: Any = None
) -> dict[str, Any]:
    """Values for all keys of `requested`: as given, as the model was `trained`, or a recipe's default.

    None stands for what was not given. Raises UsageError for a value that no rollout can have, also with `source` or
    `start`.
    """
    chosen = over_trained({key: value for key, value in requested.items() if value is not None}, trained, digits)
    # Unlike a recipe's, a pipeline's frame rate may be a fraction, and its negative prompt is encoded as it is.
    own = {key: chosen.pop(key, getattr(GenerateConfig(), key)) for key in ("fps", "negative_prompt")}
    if not own["fps"] > 0:
        raise UsageError(f"fps must be more than 0, not {own['fps']}")
    files = {key: "given" for key, value in (("source", source), ("start", start)) if value is not None}
    try:
        config = GenerateConfig.model_validate({**chosen, **files})
    except ValidationError as error:
        raise RecipeError(*explain(error, GenerateConfig)) from None
    return {key: own[key] if key in own else getattr(config, key) for key in requested}


def frames_asked(num_frames: int | None, seconds: float | None, fps: float, temporal: int) -> int | None:
    """Latent frames of a video of `num_frames` or `seconds`; None if neither is given. Raises UsageError.

    `temporal` is the number of video frames in a latent frame.
    """
    if num_frames is not None and seconds is not None:
        raise UsageError("give num_frames or seconds, not both")
    if seconds is not None:
        num_frames = video_frames(seconds, fps)
    if num_frames is None:
        return None
    if num_frames < 1:
        raise UsageError(f"num_frames must be at least 1, not {num_frames}")
    return latent_frames(num_frames, temporal)
