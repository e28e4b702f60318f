"""What a pass of attention costs: dense against latent, side by side in one process, in the steady state.

One layer attends from a chunk to a full window of random history. Every repeat times all variants one
after the other, so that what else the machine does hits them alike; medians are compared. Nothing of
the cost depends on the values of the weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table
from torch import Tensor

from ..errors import UsageError
from ..mla.attention import CausalSelfAttention, DenseSelfAttention, stream_pass
from ..mla.cache import DenseCache, FrameCache, LatentCache
from ..mla.config import MLAConfig, OwnChunk, Position
from ..mla.core import KeyValue
from ..mla.kernels import Kernels, Mode, describe
from ..mla.latent import LatentSelfAttention
from ..mla.rope import RotaryTable, split_rotary_table
from ..mla.window import CausalConfig
from .geometry import Geometry
from .text import layout_parts

DENSE, ROTATED, LATENT = "dense", "dense_rotated", "latent"


class BenchConfig(BaseModel):
    """What is timed. `window_frames` and `queries_frames` count latent frames; 0 repeats warm up nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    position: Position = "rotate_on_read"
    own_chunk: OwnChunk = "exact"
    kv_lora_rank: int = Field(224, ge=1)
    layers_per_latent: int = Field(1, ge=1)
    qk_rope_head_dim: int = Field(0, ge=0)
    batch_size: int = Field(1, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    kernels: Mode = "auto"
    repeats: int = Field(5, ge=1)


class RotatedDenseAttention(DenseSelfAttention):
    """Dense attention whose cache holds rotated keys, as a cache with absolute positions may."""

    def expand(self, rows: Tensor) -> KeyValue:
        key, value = rows.chunk(2, dim=-1)
        return KeyValue(self.split_heads(key), None, self.split_heads(value))


def bench(
    geometry: Geometry, config: BenchConfig, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Times of one layer's pass and bytes of its cache; `ratio_*` is dense over latent, above 1 where latent wins.

    Milliseconds are medians with the range of the repeats. Raises UsageError for a device that is not
    there or sizes that cannot be.
    """
    device = _device(config.device)
    dtype = cast(torch.dtype, getattr(torch, config.dtype))
    kernels = Kernels(config.kernels)
    passes = {
        name: _steady_pass(layer, cache_class, geometry, config.batch_size, dtype, device, kernels)
        for name, (layer, cache_class) in _layers(geometry, config).items()
    }
    for run, _ in passes.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in passes}
    for repeat in range(config.repeats):
        for name, (run, _) in passes.items():
            times[name].append(_timed(run, device))
        if progress is not None:
            progress(repeat + 1, config.repeats)
    found = {name: _summary(values) for name, values in times.items()}
    medians = {name: summary["median_ms"] for name, summary in found.items()}
    cache_bytes = {name: cache.bytes() for name, (_, cache) in passes.items()}
    # Every layer of a latent reads all of it, and has its share of what is cached.
    cache_bytes[LATENT] //= config.layers_per_latent
    chunk, window = geometry.num_frames_per_block, geometry.window_frames
    return {
        "model": geometry.name,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "dtype": config.dtype,
        "position": config.position,
        "own_chunk": config.own_chunk,
        "kv_lora_rank": config.kv_lora_rank,
        "layers_per_latent": config.layers_per_latent,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "batch_size": config.batch_size,
        "queries": chunk * geometry.tokens_per_frame,
        "keys": window * geometry.tokens_per_frame,
        "repeats": config.repeats,
        "attention": found,
        "ratio_attention": medians[DENSE] / medians[LATENT],
        "ratio_attention_rotated": medians[ROTATED] / medians[LATENT],
        "cache_bytes_per_layer": cache_bytes,
        "ratio_cache": cache_bytes[DENSE] / cache_bytes[LATENT],
        "kernels": kernels.report(),
    }


def verdict(result: dict[str, Any]) -> str:
    """What latent attention costs beside dense attention, in one line."""
    time, memory = 1 / result["ratio_attention"], result["ratio_cache"]
    how = f"{time:.2f}x the time of dense attention" if time >= 1 else f"{1 / time:.2f}x as fast as dense attention"
    return f"latent: {how}, {memory:.1f}x less cache"


def bench_table(result: dict[str, Any]) -> Table:
    """The result for a terminal."""
    table = Table(
        title=f"{result['model']}: one layer, {result['queries']:,} queries, {result['keys']:,} keys in the window, "
        f"{result['dtype']}, {result['device']}",
        caption=f"{verdict(result)}\nmedians of {result['repeats']} interleaved passes; {describe(result['kernels'])}",
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("attention", "ms a pass", "range", "against latent", "cache a layer"):
        table.add_column(heading, justify="left" if heading == "attention" else "right")
    labels = {
        DENSE: "dense, window re-indexed",
        ROTATED: "dense, rotated keys kept",
        LATENT: ", ".join(["latent", *layout_parts({**result, "kv_lora_rank": None})]),
    }
    latent = result["attention"][LATENT]["median_ms"]
    for name, summary in result["attention"].items():
        table.add_row(
            labels[name],
            f"{summary['median_ms']:.4g}",
            f"{summary['min_ms']:.4g} to {summary['max_ms']:.4g}",
            f"{summary['median_ms'] / latent:.2f}x",
            f"{result['cache_bytes_per_layer'][name] / 1e6:,.2f} MB",
        )
    return table


def _layers(geometry: Geometry, config: BenchConfig) -> dict[str, tuple[CausalSelfAttention, type[FrameCache]]]:
    heads, head_dim = geometry.num_attention_heads, geometry.attention_head_dim
    shape = (heads * head_dim, heads, head_dim, 1e-6, 0)
    shared = config.qk_rope_head_dim // 2
    if config.qk_rope_head_dim % 2 or shared > head_dim // 2:
        raise UsageError(f"qk_rope_head_dim {config.qk_rope_head_dim} must be even and at most {head_dim}")
    if config.position != "rotate_on_read" and not shared:
        raise UsageError(f"position {config.position} needs qk_rope_head_dim above 0")
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


def _steady_pass(
    layer: CausalSelfAttention,
    cache_class: type[FrameCache],
    geometry: Geometry,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
) -> tuple[Callable[[], Tensor], FrameCache]:
    """A denoising pass of `layer` over a window that is full, and its cache."""
    layer = layer.to(device, dtype).requires_grad_(False).eval()
    causal = CausalConfig(num_frames_per_block=geometry.num_frames_per_block, window_frames=geometry.window_frames)
    width = _width(geometry.tokens_per_frame)
    cache = cache_class(causal, [layer.row_width], batch_size, geometry.tokens_per_frame // width, width, dtype, device)
    cache.rows[0].normal_()
    cache.frames_seen = geometry.window_frames
    queries = geometry.num_frames_per_block * geometry.tokens_per_frame
    channels = geometry.num_attention_heads * geometry.attention_head_dim
    hidden_states = torch.randn(batch_size, queries, channels, device=device, dtype=dtype)
    table = _table(geometry, device)

    def run() -> Tensor:
        with torch.no_grad():
            step = stream_pass(table, cache, geometry.num_frames_per_block, write=False)
            step.kernels = kernels
            return layer.attention(hidden_states, step.of(layer, hidden_states))

    return run, cache


def _table(geometry: Geometry, device: torch.device) -> RotaryTable:
    pairs = geometry.attention_head_dim // 2
    angles = torch.outer(torch.arange(geometry.rope_max_seq_len), 10000 ** -(torch.arange(pairs) / pairs))
    return split_rotary_table(torch.polar(torch.ones_like(angles), angles).to(device), geometry.attention_head_dim)


def _width(tokens: int) -> int:
    """The divisor of `tokens` next to its square root: the grid's shape does not matter to the time."""
    return min(
        (side for side in range(1, tokens + 1) if tokens % side == 0), key=lambda side: abs(side * side - tokens)
    )


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def _summary(times: list[float]) -> dict[str, float]:
    return {"median_ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times)}


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device {name!r}; cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("no CUDA device here; leave --device out to measure the CPU")
    return device
