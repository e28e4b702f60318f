"""Defines the settings of kernels, as in the `streaming` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["auto", "triton", "torch"]
History = Literal["auto", "chunk", "pass"]


@dataclass(frozen=True)
class KernelSettings:
    """How a model attends while it streams without gradients.

    `mode` `auto` uses kernels for the layers that they support, once their first output with and without history has
    agreed with torch's. It uses torch for other layers, in float32 and on a CPU. `triton` raises UserError for a layer
    without a kernel and compares nothing. `torch` uses no kernels.

    `history` says how often a history is expanded. `chunk`: once per chunk and layer, which takes the memory of a dense
    cache. `pass`: in every denoising pass, in one workspace for all layers. `auto`: once per chunk if the histories of
    all layers fit in half of the device's free memory when the first is expanded, otherwise in every pass.

    `cuda_graph` lets `stream_chunks` replay its passes as a CUDA graph where possible.
    """

    mode: Mode = "auto"
    history: History = "auto"
    cuda_graph: bool = True
