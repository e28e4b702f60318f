"""The `streaming` section of a recipe: who attends while a model streams, and how its passes are launched."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ..mla.kernels import History, Mode


class StreamingConfig(BaseModel):
    """How models are executed while they stream. What they compute stays the same, to rounding.

    `kernels`: `auto` takes fused Triton kernels on a GPU where they support a layer, after their first output has
    agreed with torch's, and plain torch elsewhere and on a CPU; `triton` refuses instead to go by torch; `torch`
    takes no kernel. Which kernel follows from counted operations and the committed costs of the device.

    `expand_history`: an expanded history is made once a `chunk`, for the memory of a dense cache, or at every
    `pass`; `auto` is `chunk` where that takes at most half of the device's free memory.

    `cuda_graph`: `auto` replays the denoising passes of a chunk as a CUDA graph where that can be done.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kernels: Mode = "auto"
    expand_history: History = "auto"
    cuda_graph: Literal["auto", "off"] = "auto"

    def apply(self, *models: Any) -> None:
        """Have each of the causal `models` stream like this."""
        for model in models:
            model.set_kernels(self.kernels, self.expand_history, self.cuda_graph == "auto")
