"""The `streaming` section of a recipe: who attends while a model streams, its passes and its cache."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

from ..mla.bits import CacheBits, check_bits
from ..mla.kernels import History, Mode


class StreamingConfig(BaseModel):
    """How models are executed while they stream. But for `cache`, what they compute stays the same, to rounding.

    `kernels`: `auto` takes fused Triton kernels on a GPU where they support a layer, after their first output has
    agreed with torch's, and plain torch elsewhere and on a CPU; `triton` refuses instead to go by torch; `torch`
    takes no kernel. Which kernel follows from counted operations and the committed costs of the device.

    `expand_history`: an expanded history is made once a `chunk`, for the memory of a dense cache, or at every
    `pass`; `auto` is `chunk` where that takes at most half of the device's free memory.

    `cuda_graph`: `auto` replays the denoising passes of a chunk as a CUDA graph where that can be done.

    `cache`: in how many bits a converted model keeps its latents: `auto` in its dtype, `int8` in 8, with a scale for
    each 64 of them; or pairs [latents, bits] with 8 and 4 bits, such as `[[24, 8], [64, 4]]`, since the first latents
    matter most. The last pair takes what is left of a latent, and a shared rotary key beside it has 8. Kernels read
    the first two; torch attends to latents in 4 bits. Dense models and AnyFlow-FAR take `auto` alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kernels: Mode = "auto"
    expand_history: History = "auto"
    cuda_graph: Literal["auto", "off"] = "auto"
    cache: Annotated[CacheBits, AfterValidator(check_bits)] = "auto"

    @property
    def dense(self) -> StreamingConfig:
        """The same for a dense model beside a converted one."""
        return self.model_copy(update={"cache": "auto"})

    def apply(self, *models: Any) -> None:
        """Have each of the causal `models` stream like this. Raises UserError for a `cache` that one cannot have."""
        for model in models:
            model.set_cache(self.cache)
            model.set_kernels(self.kernels, self.expand_history, self.cuda_graph == "auto")
