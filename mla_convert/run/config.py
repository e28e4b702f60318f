"""The `generate` section of a recipe: how samples are rolled out."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class GenerateConfig(BaseModel):
    """A streaming rollout of `num_frames` latent frames for each of `prompts`.

    `latent_height` and `latent_width` are needed where the data does not fix them. `shift` warps the
    denoising times, `context_noise` is the noise level at which a finished chunk is cached. A
    `guidance_scale` other than 1 is classifier-free guidance against the empty prompt, at twice the
    work and twice the cache. `start` is a file that the video begins with: a .safetensors with clean
    `latents` `[C, F0, H, W]`, or for a model of pixels an image or video; its F0 frames count among
    `num_frames` and end with a chunk.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: tuple[str, ...] = ()
    num_frames: int = Field(21, ge=1)
    num_inference_steps: int = Field(8, ge=1)
    shift: float = Field(1.0, gt=0)
    guidance_scale: float = Field(1.0, ge=0)
    context_noise: float = Field(0.0, ge=0, le=1)
    latent_height: int | None = Field(None, ge=1)
    latent_width: int | None = Field(None, ge=1)
    fps: int = Field(16, ge=1)
    seed: int = 0
    start: str | None = None
