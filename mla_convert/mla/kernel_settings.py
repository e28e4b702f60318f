"""What is asked of kernels: the keys of a recipe's `streaming` that are about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["auto", "triton", "torch"]
History = Literal["auto", "chunk", "pass"]


@dataclass(frozen=True)
class KernelSettings:
    """How a model is to attend while it streams without gradients.

    `mode` `auto` takes kernels where they support a layer, after the first output with and without history has
    agreed with torch's, and torch elsewhere, in float32 and on a CPU; `triton` raises UserError instead and
    compares nothing; `torch` never asks.

    `history` says how often an expanded history is made: `chunk` once a chunk and layer, for the memory of a dense
    cache; `pass` at every denoising pass, in one workspace for all layers; `auto` once a chunk where the histories
    of all layers take at most half of the device's free memory when the first of them is made, else once a pass.

    `cuda_graph` lets `stream_chunks` replay its passes as a CUDA graph where that can be done.
    """

    mode: Mode = "auto"
    history: History = "auto"
    cuda_graph: bool = True
