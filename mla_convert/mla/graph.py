"""Replays the denoising passes of a chunk from a CUDA graph, captured once per shape.

All inputs that change between replays are in tensors at fixed addresses: the noisy chunk, the noise level, the text,
and the cache's places (ring slots and rotations). For small chunks, launching thousands of kernels from Python costs
more than running them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cache import FrameCache
from .model import StreamingModel
from .plain import captured_state, is_plain
from .window import Chunk

logger = logging.getLogger(__name__)


def why_not_graph(model: StreamingModel, cache: FrameCache) -> str | None:
    """Why the passes of `model` over `cache` cannot be captured, in one line; None when they can."""
    if model.device.type != "cuda":
        return f"CUDA graphs need a CUDA device, but the model is on {model.device.type}"
    if model.kernels is None or not model.kernels.settings.cuda_graph:
        return "CUDA graphs are off"
    if model.training:
        return "the model is in training mode"
    # The file of a standalone checkpoint may be older than this.
    if getattr(model, "parallel", None) is not None:
        return "several processes share each chunk, and their exchanges are not captured"
    if not (isinstance(cache, FrameCache) and cache.is_ring):
        return f"{type(cache).__name__} is not a ring of frames"
    if cache.shared:
        return f"a {type(cache).__name__} serves one chunk only"
    if cache.rows[0].device != model.device:
        return "the cache is on another device than the model"
    hooked = next((name for name, module in model.named_modules() if not is_plain(module)), None)
    if hooked is not None:
        return f"the forward of {hooked or 'the model'} is wrapped, as offloading does"
    return None


class GraphedChunk:
    """Runs the passes of a model over its cache without `write`, on a CUDA device; a compiled model runs compiled.

    For each shape of chunk and history, and each state of adapters, the first chunk runs eagerly and the second
    captures a graph. Where histories are kept for the passes of a chunk, there are two graphs: one that expands them
    and one that reuses them. The result of a replay is valid until the next call. If a capture fails, a warning is
    logged and all later passes run eagerly. Made by `denoiser`, which asks `why_not_graph` first.
    """

    def __init__(self, model: StreamingModel, cache: FrameCache) -> None:
        self.model, self.cache = model, cache
        self.failed = self.overwrites = False
        cache.places.fixed = True
        self.shape: tuple[Any, ...] | None = None
        self.first: Chunk | None = None
        self.graphs: dict[bool, tuple[CUDARecorder, Tensor]] = {}
        self.inputs: tuple[Tensor, ...] = ()
        self.conditions: dict[str, Tensor] = {}

    def __call__(self, hidden_states: Tensor, timestep: Tensor, text: Tensor, **conditions: Tensor) -> Tensor:
        """Velocity `[B, C, F, H, W]`; the arguments are those of `forward_chunk`."""
        frames = hidden_states.shape[2]
        places = self.cache.places.next(self.model.rotary_table, self.cache, frames)
        given = (hidden_states, timestep, text)
        # A callback may change adapters between the passes of a chunk, and hooks, as of offloading, come and go.
        state = None if self.failed else captured_state(self.model)
        if state is None:
            return self._run(given, conditions)
        # Places in new memory, after a change of shape or a reset, need a new graph.
        condition_shapes = tuple(sorted((name, value.shape) for name, value in conditions.items()))
        shape = (*(x.shape for x in given), places.memory, condition_shapes, state)
        chunk = Chunk(self.cache.frames_seen, self.cache.frames_seen + frames)
        if shape != self.shape:
            self.graphs, self.first = {}, chunk
            self.inputs = tuple(x.clone() for x in given)
            self.conditions = {name: value.clone() for name, value in conditions.items()}
            self.shape = shape
        if chunk == self.first:
            # While a window fills up, every chunk has its own shape, so a graph would never be replayed.
            return self._run(given, conditions)
        for kept, new in zip(self.inputs, given, strict=True):
            kept.copy_(new)
        for name, value in conditions.items():
            self.conditions[name].copy_(value)
        histories, layers = self.cache.expanded, range(len(self.cache.rows))
        expands = not all(histories.holds(layer, chunk) for layer in layers)
        # If no histories are kept, all passes are the same.
        which = expands and bool(histories.keep)
        if which not in self.graphs:
            try:
                captured = self._capture(expands)
            except RuntimeError as error:
                self._give_up(error)
                return self._run(given, conditions)
            # The warm-up may have decided to keep histories.
            which = expands and bool(histories.keep)
            self.graphs[which] = captured
        recorder, out = self.graphs[which]
        recorder.replay()
        histories.filled(layers, chunk)
        if self.overwrites:
            self.cache.overwritten(chunk.stop)
        return out

    def _capture(self, expands: bool) -> tuple[CUDARecorder, Tensor]:
        """Capture the pass that expands the histories, or the pass that reuses them."""
        # The two graphs share memory, as they never run at once.
        recorder = CUDARecorder(self.model.device, next((beside for beside, _ in self.graphs.values()), None))

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
        """Run all later passes eagerly."""
        # The error that ends a capture says only that it failed; its context has the cause.
        reason = " ".join(str(error.__context__ or error).split())[:200]
        logger.warning("CUDA graphs: a capture failed, so all later passes run without a graph: %s", reason)
        # The capture may not have written the histories that it was to expand.
        self.failed, self.graphs = True, {}
        self.cache.expanded.forget()


class CUDARecorder:
    """A CUDA graph that shares its side stream and memory pool with the recorder `beside`, if any."""

    def __init__(self, device: torch.device, beside: CUDARecorder | None = None) -> None:
        self.device = device
        self.graph = torch.cuda.CUDAGraph()
        self.side: torch.cuda.Stream = torch.cuda.Stream(device) if beside is None else beside.side
        self.pool: Any = torch.cuda.graph_pool_handle() if beside is None else beside.pool

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        """The result of `run`; `replay` overwrites it in the same memory.

        Raises RuntimeError if `run` cannot be captured, and restores torch's state.
        """
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        # Also around the capture, because a failed capture leaves its stream as the current one.
        with torch.cuda.stream(self.side):
            # One pass to warm up is enough: the previous chunk has already compiled and checked the kernels.
            run()
            try:
                # The model's device need not be the current one, and other threads may use theirs meanwhile.
                with torch.cuda.graph(self.graph, pool=self.pool, stream=self.side, capture_error_mode="thread_local"):
                    out = run()
            except BaseException:
                self._recover()
                raise
        torch.cuda.current_stream(self.device).wait_stream(self.side)
        return out

    def _recover(self) -> None:
        """Tell the allocator that the failed capture has ended, and the generator by means of a small capture."""
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
            torch._C._cuda_releasePool(self.device.index, self.pool)
        with contextlib.suppress(Exception):
            some = torch.zeros(1, device=self.device)
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.side, capture_error_mode="thread_local"):
                some.add_(1)

    def replay(self) -> None:
        self.graph.replay()


def denoiser(model: StreamingModel, cache: FrameCache) -> Callable[..., Tensor]:
    """`model.forward_chunk` over `cache` without `write`, replayed from a CUDA graph where possible."""
    if why_not_graph(model, cache) is None:
        return GraphedChunk(model, cache)

    def eager(hidden_states: Tensor, timestep: Tensor, text: Tensor, **conditions: Tensor) -> Tensor:
        # Call the model, not `forward_chunk`: hooks that move weights to the device run only on calls.
        out: Tensor = model(hidden_states, timestep, text, cache=cache, write=False, **conditions)
        return out

    return eager
