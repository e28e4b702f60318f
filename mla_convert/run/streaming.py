"""Defines the `streaming` section of a recipe: kernels, CUDA graphs and the cache's bits while a model streams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

from ..mla.bits import CacheBits, check_bits
from ..mla.kernel_settings import History, Mode

if TYPE_CHECKING:
    from ..mla.kernels import Kernels
    from ..mla.model import StreamingModel


class StreamingConfig(BaseModel):
    """How models are executed while they stream. Except for `cache`, results stay the same, up to rounding.

    `kernels`: on a GPU, `auto` uses fused Triton kernels where they support a layer and their first output agrees with
    torch's; otherwise, and on a CPU, it uses plain torch. `triton` raises an error instead of using torch. `torch` uses
    no kernels. Which kernel is used follows from counted operations and the committed costs of the device.

    `expand_history`: `chunk` expands the history once per chunk, for the memory of a dense cache; `pass` expands it in
    every pass; `auto` is `chunk` where that takes at most half of the device's free memory.

    `cuda_graph`: `auto` replays the denoising passes of a chunk as a CUDA graph where possible.

    `cache`: the number of bits for a converted model's cached latents. `auto` keeps the model's dtype. `int8` uses 8
    bits, with one scale for each 64 latents. Pairs [latents, bits] with 8 and 4 bits, such as `[[24, 8], [64, 4]]`,
    give the first latents more, because they matter most. The last pair covers the rest of a latent, and a shared
    rotary key beside it has 8 bits. Dense models and AnyFlow-FAR accept only `auto`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kernels: Mode = "auto"
    expand_history: History = "auto"
    cuda_graph: Literal["auto", "off"] = "auto"
    cache: Annotated[CacheBits, AfterValidator(check_bits)] = "auto"

    @property
    def dense(self) -> StreamingConfig:
        """The same settings for a dense model, which has no latents to store in fewer bits."""
        return self.model_copy(update={"cache": "auto"})

    def apply(self, *models: StreamingModel) -> list[Kernels]:
        """Apply these settings to each of the causal `models`; their kernels report what each of them chose.

        Raises UserError if a model does not support `cache`.
        """
        chosen = []
        for model in models:
            model.set_cache(self.cache)
            chosen.append(model.set_kernels(self.kernels, self.expand_history, self.cuda_graph == "auto"))
        return chosen
