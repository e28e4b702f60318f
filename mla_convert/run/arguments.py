"""Checks and completes the arguments of a pipeline's call, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UsageError
from ..flow import check_steps
from .config import GenerateConfig
from .latents import latent_frames, video_frames
from .sample import trained_for


def check_arguments(
    *,
    output_type: str,
    prompt: Any,
    prompt_embeds: Any,
    seed: Any,
    generator: Any,
    source: Any,
    strength: float | None,
    start: Any,
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
    if source is None and strength is not None:
        raise UsageError("strength says how much of a source is replaced; give source=, or leave strength out")
    if source is not None and start is not None:
        raise UsageError("source= already determines the first frames; leave start= out")
    if last_image is not None:
        raise UsageError("last_image is not supported, because a streamed video has no fixed end; leave it out")
    if num_videos_per_prompt < 1:
        raise UsageError(f"num_videos_per_prompt must be at least 1, not {num_videos_per_prompt}")


def sampling_settings(requested: Mapping[str, Any], trained: Mapping[str, Any], digits: bool) -> dict[str, Any]:
    """Values for all keys of `requested`: as given, as the model was `trained`, or a recipe's default.

    None stands for what was not given. Raises UsageError for a value that no rollout can have.
    """
    given = {key: value for key, value in requested.items() if value is not None}
    if "num_inference_steps" in given:
        if "denoising_steps" in given:
            raise UsageError("give num_inference_steps or denoising_steps, not both")
        given = {"denoising_steps": None, "first_chunk_steps": None, **given}
    chosen = {**trained_for(trained, digits), **given}
    values: dict[str, Any] = {key: chosen.get(key, getattr(GenerateConfig(), key)) for key in requested}
    if values["sampler"] not in ("euler", "renoise"):
        raise UsageError(f"unknown sampler {values['sampler']!r}; use euler or renoise")
    for key in ("denoising_steps", "first_chunk_steps"):
        try:
            check_steps(None if values[key] is None else tuple(values[key]))
        except ValueError as error:
            raise UsageError(f"{key}: {error}") from None
    for key in ("num_inference_steps", "shift", "fps"):
        if not values[key] > 0:
            raise UsageError(f"{key} must be more than 0, not {values[key]}")
    return values


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
