"""Define the recipe keys for sampling a model, which have the same meaning in every section."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from .flow import Sampler, check_steps


def _as_tuple(value: Any) -> Any:
    # A section with a `before` validator passes a list on, which a strict tuple refuses.
    return tuple(value) if isinstance(value, list) else value


DenoisingSteps = Annotated[tuple[int, ...], BeforeValidator(_as_tuple), AfterValidator(check_steps)]
"""Noise levels out of 1000, before any shift, that fall inside [1, 1000]."""

# torch takes seeds below 2^64, so there is room to count up from the largest: one per prompt, repetition or batch.
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""A seed of a recipe or an option."""


class SamplingConfig(BaseModel):
    """How a chunk is denoised and cached.

    A chunk takes `num_inference_steps` steps, or one at each of `denoising_steps`; the first chunk takes
    `first_chunk_steps` if they are set. `shift` warps the steps. `sampler` is `euler` or `renoise`. `guidance_scale` is
    the scale of classifier-free guidance. `context_noise` is the noise level in [0, 1] at which a finished chunk is
    cached. Sections may override the defaults.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    num_inference_steps: int = Field(8, ge=1)
    sampler: Sampler = "euler"
    denoising_steps: DenoisingSteps | None = None
    first_chunk_steps: DenoisingSteps | None = None
    shift: float = Field(1.0, gt=0)
    guidance_scale: float = Field(1.0, ge=0)
    context_noise: float = Field(0.0, ge=0, le=1)

    def sampling(self) -> dict[str, Any]:
        """The values of these keys by name, as arguments of `stream_chunks`."""
        return {key: getattr(self, key) for key in SamplingConfig.model_fields}
