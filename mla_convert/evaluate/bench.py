"""Times the attention of dense and latent layers in the passes of a chunk, in the steady state of streaming.

One layer attends from a chunk to a full window of random history. Three passes are timed: the first pass of a chunk,
which expands the history; a later pass, which reuses the expanded history if it is kept; and the pass that writes
the cache. Every repeat times all variants in turn, so that other load on the machine affects them equally, and
medians are compared. The cost does not depend on the values of the weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor

from ..devices import default_device, has_gpu, lacks_bfloat16
from ..dtypes import full_name
from ..errors import UsageError
from ..mla.attention import AttentionPass, CausalSelfAttention, DenseSelfAttention, stream_pass
from ..mla.cache import DenseCache, FrameCache, LatentCache
from ..mla.config import MLAConfig, OwnChunk, Position
from ..mla.core import KeyValue
from ..mla.kernel_settings import Mode
from ..mla.kernels import Kernels
from ..mla.latent import LatentSelfAttention
from ..mla.rope import RotaryTable, rotate, split_rotary_table
from ..mla.window import CausalConfig
from .geometry import StreamGeometry

BY_TORCH = (
    "kernels attend to latents, but plain torch gathers and rotates dense histories; "
    "the ratios do not show what kernels gain"
)
DENSE, ROTATED, LATENT = "dense", "dense_rotated", "latent"
FIRST, LATER, WRITE, STREAMED = "attention", "attention_later", "attention_write", "attention_streamed"
PARTS = (FIRST, LATER, WRITE, STREAMED)


class BenchConfig(BaseModel):
    """Settings of the benchmark. It defaults to the first GPU in bfloat16, or the CPU in float32 without a GPU.

    A chunk is streamed in `num_inference_steps` passes and one that writes the cache.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    position: Position = "rotate_on_read"
    own_chunk: OwnChunk = "exact"
    kv_lora_rank: int = Field(224, ge=1)
    layers_per_latent: int = Field(1, ge=1)
    qk_rope_head_dim: int = Field(0, ge=0)
    batch_size: int = Field(1, ge=1)
    num_inference_steps: int = Field(4, ge=1)
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], BeforeValidator(full_name)] | None = None
    device: str | None = None
    kernels: Mode = "auto"
    repeats: int = Field(5, ge=1)


class RotatedDenseAttention(DenseSelfAttention):
    """Dense attention that caches rotated keys, which is possible with absolute positions."""

    def expand(self, rows: Tensor, heads: slice | None = None) -> KeyValue:
        key, value = rows.chunk(2, dim=-1)
        return KeyValue(self.split_heads(key), None, self.split_heads(value))

    def encode(self, key: Tensor, value: Tensor, step: AttentionPass) -> Tensor:
        rotated = rotate(self.split_heads(key), step.views[0].own_rotations).flatten(2)
        return super().encode(rotated, value, step)


def bench(
    geometry: StreamGeometry, config: BenchConfig, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Measure the time of one layer's passes and the bytes of its cache.

    `ratio_*` is dense over latent, above 1 where latent is faster or smaller. `attention` is the first pass of a chunk.
    `attention_later` is a later pass, equal to the first if no history is kept (`history_kept`). `attention_write` is
    the pass that writes. `attention_streamed` is the mean over one first pass, `num_inference_steps` - 1 later ones
    and one that writes. Times are medians in milliseconds with the range of the repeats. `note` explains the ratios
    when kernels run. Raises UsageError for a missing device or impossible sizes.
    """
    _check_sizes(geometry, config)
    device, dtype = _place(config)
    kernels = Kernels(config.kernels)
    passes = {
        # A kernel would rotate these keys a second time.
        name: _Passes(
            layer, cache_class, geometry, config, dtype, device, Kernels("torch") if name == ROTATED else kernels
        )
        for name, (layer, cache_class) in _layers(geometry, config).items()
    }
    times: dict[str, dict[str, list[float]]] = {part: {name: [] for name in passes} for part in PARTS}
    for one in passes.values():
        one.timed(config.num_inference_steps)
    for repeat in range(config.repeats):
        for name, one in passes.items():
            for part, milliseconds in one.timed(config.num_inference_steps).items():
                times[part][name].append(milliseconds)
        if progress is not None:
            progress(repeat + 1, config.repeats)
    found = {part: {name: _summary(values) for name, values in named.items()} for part, named in times.items()}
    cache_bytes = {name: one.cache.bytes() for name, one in passes.items()}
    # A shared latent is read in full by each of its layers but cached once, so each layer counts its share.
    cache_bytes[LATENT] //= config.layers_per_latent
    chunk, window, threads = geometry.num_frames_per_block, geometry.window_frames, torch.get_num_threads()
    return {
        "model": geometry.name,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {threads} thread{'' if threads == 1 else 's'}",
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "position": config.position,
        "own_chunk": config.own_chunk,
        "kv_lora_rank": config.kv_lora_rank,
        "layers_per_latent": config.layers_per_latent,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "batch_size": config.batch_size,
        "queries": chunk * geometry.tokens_per_frame,
        "keys": window * geometry.tokens_per_frame,
        "num_inference_steps": config.num_inference_steps,
        "repeats": config.repeats,
        **found,
        **{f"ratio_{part}": _ratio(named, DENSE) for part, named in found.items()},
        **{f"ratio_{part}_rotated": _ratio(found[part], ROTATED) for part in (FIRST, STREAMED)},
        "history_kept": {name: one.keeps for name, one in passes.items()},
        "cache_bytes_per_layer": cache_bytes,
        "ratio_cache": cache_bytes[DENSE] / cache_bytes[LATENT],
        "kernels": kernels.report(),
        "note": BY_TORCH if any(path != "torch" for path in kernels.report()["paths"]) else None,
    }


def _check_sizes(geometry: StreamGeometry, config: BenchConfig) -> None:
    """Raise UsageError for a window or a latent that the model cannot have."""
    chunk, layers, shared = geometry.num_frames_per_block, geometry.num_layers, config.layers_per_latent
    if geometry.window_frames < chunk:
        raise UsageError(
            f"a window holds at least a chunk of {chunk} frames, got {geometry.window_frames}; raise --frames"
        )
    if layers % shared:
        possible = ", ".join(str(count) for count in range(1, layers + 1) if layers % count == 0)
        raise UsageError(f"{layers} layers cannot share latents {shared} at a time; one of {possible}")
    limit = 2 * geometry.inner_dim * shared
    if config.kv_lora_rank > limit:
        of_all = "a layer" if shared == 1 else f"{shared} layers"
        raise UsageError(
            f"kv_lora_rank {config.kv_lora_rank} is out of range; keys and values of {of_all} have {limit} directions"
        )
    head_dim = geometry.attention_head_dim
    if config.qk_rope_head_dim % 2 or config.qk_rope_head_dim > head_dim:
        raise UsageError(f"qk_rope_head_dim {config.qk_rope_head_dim} must be even and at most {head_dim}")
    if config.position != "rotate_on_read" and not config.qk_rope_head_dim:
        raise UsageError(f"position {config.position} needs qk_rope_head_dim above 0")


def _layers(geometry: StreamGeometry, config: BenchConfig) -> dict[str, tuple[CausalSelfAttention, type[FrameCache]]]:
    heads, head_dim = geometry.num_attention_heads, geometry.attention_head_dim
    shape = (heads * head_dim, heads, head_dim, 1e-6, 0)
    shared = config.qk_rope_head_dim // 2
    carried = range(shared) if config.position != "rotate_on_read" else range(0)
    mla = MLAConfig(
        position=config.position,
        own_chunk=config.own_chunk,
        kv_lora_rank=(config.kv_lora_rank,),
        v_head_dim=head_dim,
        rope_pairs=(tuple(carried),),
        nope_pairs=(tuple(pair for pair in range(head_dim // 2) if pair not in carried),),
    )
    return {
        DENSE: (DenseSelfAttention(*shape), DenseCache),
        ROTATED: (RotatedDenseAttention(*shape), DenseCache),
        LATENT: (LatentSelfAttention(*shape, mla), LatentCache),
    }


class _Passes:
    """The passes of one chunk of `layer` over a full window, and its `cache`."""

    def __init__(
        self,
        layer: CausalSelfAttention,
        cache_class: type[FrameCache],
        geometry: StreamGeometry,
        config: BenchConfig,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels,
    ) -> None:
        self.layer = layer.to(device, dtype).requires_grad_(False).eval()
        self.device, self.kernels, self.frames = device, kernels, geometry.num_frames_per_block
        causal = CausalConfig(num_frames_per_block=self.frames, window_frames=geometry.window_frames)
        width = _width(geometry.tokens_per_frame)
        # The other layers take no memory, but they count when the cache decides whether all histories fit.
        rows = [layer.row_width] + [0] * (geometry.num_layers - 1)
        grid = (geometry.tokens_per_frame // width, width)
        self.cache = cache_class(causal, rows, config.batch_size, *grid, dtype, device)
        self.cache.rows[0].normal_()
        self.cache.frames_seen = geometry.window_frames
        queries = self.frames * geometry.tokens_per_frame
        channels = geometry.num_attention_heads * geometry.attention_head_dim
        self.hidden_states = torch.randn(config.batch_size, queries, channels, device=device, dtype=dtype)
        self.table = _table(geometry, device)

    @property
    def keeps(self) -> bool:
        """Whether later passes reuse the history that the first pass expanded."""
        return bool(self.cache.expanded.keep)

    def run(self, write: bool = False) -> Tensor:
        """Run one pass of the chunk."""
        with torch.no_grad():
            step = stream_pass(lambda: self.table, self.cache, self.frames, write)
            step.kernels = self.kernels
            return self.layer.attention(self.hidden_states, step.of(self.layer, self.hidden_states))

    def timed(self, steps: int) -> dict[str, float]:
        """The milliseconds of each of PARTS, for a chunk of `steps` steps."""
        self.cache.expanded.forget()
        first = _timed(self.run, self.device)
        later = _timed(self.run, self.device) if self.keeps else first
        write = _timed(lambda: self.run(write=True), self.device)
        return {FIRST: first, LATER: later, WRITE: write, STREAMED: (first + (steps - 1) * later + write) / (steps + 1)}


def _table(geometry: StreamGeometry, device: torch.device) -> RotaryTable:
    pairs = geometry.attention_head_dim // 2
    angles = torch.outer(torch.arange(geometry.rope_max_seq_len), 10000 ** -(torch.arange(pairs) / pairs))
    return split_rotary_table(torch.polar(torch.ones_like(angles), angles).to(device), geometry.attention_head_dim)


def _width(tokens: int) -> int:
    """The divisor of `tokens` closest to its square root; the grid's shape does not affect the time."""
    return min(
        (side for side in range(1, tokens + 1) if tokens % side == 0), key=lambda side: abs(side * side - tokens)
    )


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    """The milliseconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def _ratio(found: dict[str, dict[str, float]], over: str) -> float:
    """A variant's median time divided by that of latent attention."""
    return found[over]["median_ms"] / found[LATENT]["median_ms"]


def _summary(times: list[float]) -> dict[str, float]:
    return {"median_ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times)}


def _place(config: BenchConfig) -> tuple[torch.device, torch.dtype]:
    """The device and dtype to compute in. Raises UsageError for a missing device."""
    device = default_device() if config.device is None else _device(config.device)
    # Streamed models compute in 16 bits on a GPU; in float32 no kernel would run.
    usual = "float32" if device.type == "cpu" else "float16" if lacks_bfloat16(device) else "bfloat16"
    return device, cast(torch.dtype, getattr(torch, config.dtype or usual))


def _device(name: str) -> torch.device:
    """The device called `name`, the CPU or a GPU of this machine. Raises UsageError."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {name!r}; use cpu, cuda or cuda:1")
    if device.type == "cpu":
        return torch.device("cpu")
    if not has_gpu():
        raise UsageError("no CUDA device found; omit --device to measure the CPU")
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise UsageError(f"there is no {name}; this machine has {count} GPU{'' if count == 1 else 's'}, from cuda:0 on")
    return device
