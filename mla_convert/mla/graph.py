"""The denoising passes of a chunk as one CUDA graph, captured once a shape and replayed from chunk to chunk.

What changes between replays lies in tensors that stay where they are: the noisy chunk, the noise
level, the text, and the cache's places (ring slots and rotations). Launching some thousand kernels from
Python costs more than running them when chunks are small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..mla.cache import FrameCache
from ..mla.places import next_places

WARM_UP = 2
"""Passes before a capture: the first use of a kernel compiles it, checks it and allocates its workspace."""


class GraphedChunk:
    """`model.forward_chunk` without `write`, for one model and its cache on a CUDA device.

    A graph is captured for each shape of chunk and history, which in the steady state is one. The
    result lies in the graph's memory until the next call.
    """

    def __init__(self, model: Any, cache: FrameCache) -> None:
        if model.device.type != "cuda":
            raise ValueError(f"CUDA graphs need a model on a CUDA device, this one is on {model.device}")
        if model.kernels is not None and model.kernels.keep_history:
            raise ValueError("a graph cannot tell the first pass of a chunk from the others; use keep_history=False")
        self.model, self.cache = model, cache
        cache.fixed_places = True
        self.shape: tuple[Any, ...] | None = None
        self.graph: Any = None
        self.inputs: tuple[Tensor, ...] = ()
        self.conditions: dict[str, Tensor] = {}
        self.out: Tensor | None = None

    def __call__(self, hidden_states: Tensor, timestep: Tensor, text: Tensor, **conditions: Tensor) -> Tensor:
        """Velocity `[B, C, F, H, W]`; the arguments are those of `forward_chunk`."""
        places = next_places(self.model.rotary_table(), self.cache, hidden_states.shape[2])
        given = (hidden_states, timestep, text)
        # New places in new memory, after a change of shape or a reset, need a new graph.
        shape = (*(x.shape for x in given), places.history_rotations.data_ptr(), tuple(sorted(conditions)))
        if shape != self.shape:
            self._capture(given, conditions)
            self.shape = shape
        for kept, new in zip(self.inputs, given, strict=True):
            kept.copy_(new)
        for name, value in conditions.items():
            self.conditions[name].copy_(value)
        self.graph.replay()
        assert self.out is not None
        return self.out

    def _capture(self, given: tuple[Tensor, ...], conditions: dict[str, Tensor]) -> None:
        self.inputs = tuple(x.clone() for x in given)
        self.conditions = {name: value.clone() for name, value in conditions.items()}
        side = torch.cuda.Stream(self.model.device)
        side.wait_stream(torch.cuda.current_stream(self.model.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._pass()
        torch.cuda.current_stream(self.model.device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = self._pass()

    def _pass(self) -> Tensor:
        with torch.no_grad():
            out: Tensor = self.model.forward_chunk(*self.inputs, self.cache, write=False, **self.conditions)
            return out
