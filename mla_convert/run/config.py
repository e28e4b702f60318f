"""The `generate` section of a recipe: how samples are rolled out."""

from __future__ import annotations

from pydantic import Field

from ..sampling import SamplingConfig


class GenerateConfig(SamplingConfig):
    """A streaming rollout of `num_frames` latent frames for each of `prompts`.

    `latent_height` and `latent_width` are needed where the data does not fix them. A chunk takes
    `num_inference_steps` steps, or instead one at each of `denoising_steps`, falling noise levels out of
    1000; `first_chunk_steps` are those of the first chunk, where it takes others (Causal-Forcing's students of
    one and two steps). `shift` warps them. `sampler` is `euler`, or `renoise` for students that were trained for it
    (Self-Forcing, Causal-Forcing, LongLive): the clean chunk is predicted and noised anew.
    `context_noise` is the noise level at which a finished chunk is cached. A
    `guidance_scale` other than 1 is classifier-free guidance away from the `negative_prompt`, without one from the
    empty prompt, at twice the work and twice the cache. `start` is a file that the video begins with: a
    .safetensors with clean `latents` `[C, F0, H, W]`, or for a model of pixels an image or video; its F0 frames
    count among `num_frames` and end with a chunk. With `hold_start` they may end inside a chunk, whose other frames are
    denoised beside them, for models that were trained so (Wan2.2 TI2V-5B, LongLive 2's image-to-video). `recache` is
    for models that were trained with it (LongLive): where the prompt changes, the cached window is computed again.
    """

    prompts: tuple[str, ...] = ()
    num_frames: int = Field(21, ge=1)
    negative_prompt: str | None = None
    latent_height: int | None = Field(None, ge=1)
    latent_width: int | None = Field(None, ge=1)
    fps: int = Field(16, ge=1)
    seed: int = 0
    start: str | None = None
    recache: bool = False
    hold_start: bool = False
