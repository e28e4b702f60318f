"""Defines the `generate` section of a recipe: how samples are rolled out."""

from __future__ import annotations

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ..flow import STRENGTH
from ..sampling import SamplingConfig, Seed
from .source import ALONE

DEFAULT_LATENT_FRAMES = 21


class GenerateConfig(SamplingConfig):
    """A streaming rollout of `num_frames` latent frames for each of `prompts`.

    - `num_frames` is 21 if left out; with a `source`, all of its frames.
    - `latent_height` and `latent_width` are by default those of the run's clips, and where clips have no size of
      their own, the model's.
    - `num_inference_steps` is the number of steps per chunk. `denoising_steps` replaces it with one step at each of
      these falling noise levels, out of 1000. `first_chunk_steps` are those of the first chunk if they differ
      (Causal-Forcing's students of one and two steps). `shift` warps all of them.
    - `sampler` is `euler`, or `renoise` for students that were trained for it (Self-Forcing, Causal-Forcing, LongLive):
      the clean chunk is predicted and gets new noise.
    - `context_noise` is the noise level at which a finished chunk is cached.
    - `guidance_scale`: a value other than 1 is classifier-free guidance away from the `negative_prompt`, or from the
      empty prompt if there is none, at twice the work and twice the cache.
    - `start` is a file that the video begins with: a .safetensors with clean `latents` `[C, F0, H, W]` or, for a
      pixel-space model, an image or video. Its F0 frames count toward `num_frames` and must end with a chunk.
    - `hold_start` lets them end inside a chunk, whose other frames are denoised beside them, for models that were
      trained that way (Wan2.2 TI2V-5B, LongLive 2's image-to-video).
    - `source` is a file that every prompt restyles: a .safetensors with clean `latents` `[C, F, H, W]` or, for a
      pixel-space model, an image or video. The video ends where it does.
    - `strength` is how much of the `source` is replaced: each chunk starts as the source with noise at this level, in
      (0, 1] before the `shift`, and takes the steps from there on.
    - `recache` recomputes the cached window where the prompt changes, for models that were trained with it (LongLive).
    """

    prompts: tuple[str, ...] = ()
    source: str | None = None
    strength: float = Field(STRENGTH, gt=0, le=1)
    num_frames: int | None = Field(None, ge=1, validate_default=True)
    negative_prompt: str | None = None
    latent_height: int | None = Field(None, ge=1)
    latent_width: int | None = Field(None, ge=1)
    fps: int = Field(16, ge=1)
    seed: Seed = 0
    start: str | None = None
    recache: bool = False
    hold_start: bool = False

    @field_validator("num_frames")
    @classmethod
    def _length(cls, value: int | None, info: ValidationInfo) -> int | None:
        return DEFAULT_LATENT_FRAMES if value is None and info.data.get("source") is None else value

    @model_validator(mode="after")
    def _source_alone(self) -> GenerateConfig:
        if self.source is None and self.strength != STRENGTH:
            raise ValueError("strength says how much of a source is replaced; give source, or leave strength out")
        if self.source is not None and self.start is not None:
            raise ValueError(ALONE)
        return self
