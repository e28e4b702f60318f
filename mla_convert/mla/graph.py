"""The denoising passes of a chunk as one CUDA graph, captured once a shape and replayed from chunk to chunk.

What changes between replays lies in tensors that stay where they are: the noisy chunk, the noise
level, the text, and the cache's places (ring slots and rotations). Launching some thousand kernels from
Python costs more than running them when chunks are small.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .cache import FrameCache
from .plain import is_plain

logger = logging.getLogger(__name__)

WARM_UP = 1
"""Passes before a capture, on its stream; the chunk before has compiled the kernels, checked them and allocated."""


class Recorder(Protocol):
    """Records what a function does on the device, to be done again without running it."""

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        """What `run` gave; `replay` writes the same memory anew."""

    def replay(self) -> None: ...


def why_not_graph(model: Any, cache: Any) -> str | None:
    """Why the passes of `model` cannot be captured, in one line; None when they can."""
    if model.device.type != "cuda":
        return f"CUDA graphs need a CUDA device, the model is on {model.device.type}"
    if model.kernels is None or not model.kernels.settings.cuda_graph:
        return "CUDA graphs are off"
    if model.training:
        return "the model is in training mode"
    if not (isinstance(cache, FrameCache) and cache.is_ring):
        return f"{type(cache).__name__} is not a ring of frames"
    if cache.shared:
        return f"a {type(cache).__name__} is made anew for every chunk"
    if cache.rows[0].device != model.device:
        return "the cache is on another device than the model"
    hooked = next((name for name, module in model.named_modules() if not is_plain(module)), None)
    if hooked is not None:
        return f"the forward of {hooked or 'the model'} is wrapped, as offloading does"
    return None


class GraphedChunk:
    """Passes of a model over its cache without `write`, on a CUDA device; a model that is compiled runs compiled.

    The first chunk of a shape of chunk and history is run as it is, and a graph is captured for the second: in the
    steady state, whose chunks are alike, one; where histories are kept for the passes of a chunk two, one that
    expands them and one that does not. What a replay gives lies in the graph's memory until the next call. Where a
    capture fails, all passes are run as they are from then on, and a warning says so. Raises ValueError with the
    reason of `why_not_graph`.

    `recorder` makes a Recorder, given another one with which it may share memory, for the two never run at once.
    """

    def __init__(
        self, model: Any, cache: FrameCache, recorder: Callable[[Recorder | None], Recorder] | None = None
    ) -> None:
        reason = why_not_graph(model, cache) if recorder is None else None
        if reason is not None:
            raise ValueError(reason)
        self.model, self.cache = model, cache
        self.recorder = recorder or (lambda beside: CUDARecorder(model.device, beside))
        self.failed = self.overwrites = False
        cache.places.fixed = True
        self.shape: tuple[Any, ...] | None = None
        self.first: tuple[int, int] | None = None
        self.graphs: dict[bool, tuple[Recorder, Tensor]] = {}
        self.inputs: tuple[Tensor, ...] = ()
        self.conditions: dict[str, Tensor] = {}

    def __call__(self, hidden_states: Tensor, timestep: Tensor, text: Tensor, **conditions: Tensor) -> Tensor:
        """Velocity `[B, C, F, H, W]`; the arguments are those of `forward_chunk`."""
        frames = hidden_states.shape[2]
        places = self.cache.places.next(self.model.rotary_table(), self.cache, frames)
        given = (hidden_states, timestep, text)
        # New places in new memory, after a change of shape or a reset, need a new graph.
        told = tuple(sorted((name, value.shape) for name, value in conditions.items()))
        shape = (*(x.shape for x in given), places.memory, told)
        chunk = (self.cache.frames_seen, frames)
        if shape != self.shape:
            self.graphs, self.first = {}, chunk
            self.inputs = tuple(x.clone() for x in given)
            self.conditions = {name: value.clone() for name, value in conditions.items()}
            self.shape = shape
        if self.failed or chunk == self.first:
            # While a window fills every chunk has a shape of its own, and a graph of it would serve no other.
            return self._run(given, conditions)
        for kept, new in zip(self.inputs, given, strict=True):
            kept.copy_(new)
        for name, value in conditions.items():
            self.conditions[name].copy_(value)
        histories, layers = self.cache.expanded, range(len(self.cache.rows))
        expands = not all(histories.holds(layer, chunk) for layer in layers)
        # Where nothing is kept all passes are alike.
        which = expands and bool(histories.keep)
        if which not in self.graphs:
            try:
                captured = self._capture(expands)
            except RuntimeError as error:
                self._give_up(error)
                return self._run(given, conditions)
            # Warming up may have decided that histories are kept.
            which = expands and bool(histories.keep)
            self.graphs[which] = captured
        recorder, out = self.graphs[which]
        recorder.replay()
        histories.filled(layers, chunk)
        if self.overwrites:
            self.cache.overwritten(sum(chunk))
        return out

    def _capture(self, expands: bool) -> tuple[Recorder, Tensor]:
        """Capture the pass that expands the histories, or the one that finds them."""
        recorder = self.recorder(next((beside for beside, _ in self.graphs.values()), None))

        def run() -> Tensor:
            if expands:
                self.cache.expanded.forget()
            return self._run(self.inputs, self.conditions)

        out = recorder.capture(run)
        self.overwrites = self.cache.written > self.cache.frames_seen
        return recorder, out

    def _run(self, given: tuple[Tensor, ...], conditions: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            out: Tensor = self.model(*given, cache=self.cache, write=False, **conditions)
            return out

    def _give_up(self, error: RuntimeError) -> None:
        """Leave all passes to the model from now on."""
        # What ends a capture says no more than that it has failed; what made it fail was raised before.
        reason = " ".join(str(error.__context__ or error).split())[:200]
        logger.warning("CUDA graphs: a capture failed, passes are launched from now on: %s", reason)
        # Of what a capture was to expand nothing may have been written.
        self.failed, self.graphs = True, {}
        self.cache.expanded.forget()


class CUDARecorder:
    """A CUDA graph, which shares its side stream and the pool of its memory with the one `beside` it."""

    def __init__(self, device: torch.device, beside: Any = None) -> None:
        self.device = device
        self.graph = torch.cuda.CUDAGraph()
        self.side = torch.cuda.Stream(device) if beside is None else beside.side
        self.pool = torch.cuda.graph_pool_handle() if beside is None else beside.pool

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        """Raises RuntimeError where `run` does what cannot be captured; torch is then as it was before."""
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        # Around the capture, too: one that fails leaves its stream as the current one.
        with torch.cuda.stream(self.side):
            for _ in range(WARM_UP):
                run()
            try:
                # On the model's device, which need not be the current one, and whatever other threads do on theirs.
                with torch.cuda.graph(self.graph, pool=self.pool, stream=self.side, capture_error_mode="thread_local"):
                    out = run()
            except BaseException:
                self._recover()
                raise
        torch.cuda.current_stream(self.device).wait_stream(self.side)
        return out

    def _recover(self) -> None:
        """Tell the allocator, and by a small capture the generator, that a capture which failed has ended."""
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
            torch._C._cuda_releasePool(self.device.index, self.pool)
        with contextlib.suppress(Exception):
            some = torch.zeros(1, device=self.device)
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.side, capture_error_mode="thread_local"):
                some.add_(1)

    def replay(self) -> None:
        self.graph.replay()


def denoiser(model: Any, cache: Any) -> Callable[..., Tensor]:
    """`model.forward_chunk` without `write` over `cache`: replayed from a CUDA graph where that can be done."""
    if why_not_graph(model, cache) is None:
        return GraphedChunk(model, cache)

    def eager(hidden_states: Tensor, timestep: Tensor, text: Tensor, **conditions: Tensor) -> Tensor:
        # By the call, not by `forward_chunk`: hooks that bring weights to the device see calls alone.
        out: Tensor = model(hidden_states, timestep, text, cache=cache, write=False, **conditions)
        return out

    return eager
