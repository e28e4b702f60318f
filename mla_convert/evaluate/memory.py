"""Computes cache bytes, streams per GPU and seconds of context for `plan`.

One stream needs its cache and the working memory of one chunk; all streams share the weights. The working memory
is the peak of the eager attention of `mla.core` in one layer, where e is the number of bytes per number and
d = heads * head_dim:

    history tokens * d * (3 e + 8)      keys and values of the window, the rotated keys, and the
                                        float32 input and product of the rotation
    chunk tokens * d * 12 e             hidden states, queries, keys and values, plain and rotated

For Wan2.1-1.3B (21 frames of 1560 tokens, chunks of 3, bfloat16) this gives 0.60 + 0.17 GB. Counted allocations are
0.73 GB for the dense model and `rotate_on_read`, 0.62 GB for `decoupled`, and 0.93 GB for `decoupled` with an exact
own chunk, whose keys are twice as wide. An 80 GB GPU thus holds 11 dense streams of 6.82 GB or 62 latent streams of
1.22 GB. A kernel that rotates without float32 copies would save 8 d bytes per history token, 0.35 GB per stream; the
GPU would then hold 11 dense or 87 latent streams.
"""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict
from rich.table import Table

from ..dtypes import checked
from ..errors import UsageError
from ..mla.bits import CacheBits, format_bits, row_bytes
from ..sizes import RESERVED_BYTES, format_bytes
from .geometry import StreamGeometry, gpu_memory
from .text import change_text, factor

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class Plan(BaseModel):
    """Memory of one model, dense and latent; `plan --json` prints its `model_dump()`.

    Bytes are per stream, except `gpu_memory_bytes`, `reserved_bytes` and `weights_bytes`. `cache` is the storage format
    of the latents (`mla/bits.py`). `reduction` is the share of cached scalars saved, 0 to 1. `max_seconds_*` is the
    longest window that a single stream can have on the GPU.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    dtype: str
    cache: str
    frames: int
    tokens_per_frame: int
    seconds_of_context: float
    dense_scalars_per_token: int
    latent_scalars_per_token: int | float
    latent_scalars_by_layer: list[int]
    reduction: float
    dense_cache_bytes: int
    latent_cache_bytes: int
    activation_bytes: int
    gpu: str
    gpu_memory_bytes: int
    reserved_bytes: int
    weights_bytes: int
    max_streams_dense: int
    max_streams_latent: int
    max_seconds_dense: float
    max_seconds_latent: float
    assumptions: list[str]


def activation_bytes(geometry: StreamGeometry, frames: int, dtype_bytes: int) -> int:
    """The working memory of one stream in a window of `frames`; the module docstring has the formula."""
    history = geometry.cached_tokens(max(frames - geometry.num_frames_per_block, 0))
    chunk = min(frames, geometry.num_frames_per_block) * geometry.tokens_per_frame
    return geometry.inner_dim * (history * (3 * dtype_bytes + 8) + chunk * 12 * dtype_bytes)


def plan(
    geometry: StreamGeometry,
    kv_lora_rank: int | Sequence[int],
    qk_rope_head_dim: int | Sequence[int] = 0,
    *,
    frames: int | None = None,
    tokens_per_frame: int | None = None,
    dtype: str = "bfloat16",
    gpu: str = "H100",
    cache: CacheBits = "auto",
) -> Plan:
    """Compute the memory of `geometry` with a dense and with a latent cache.

    `kv_lora_rank` and `qk_rope_head_dim` are one value for all layers or one per layer; `qk_rope_head_dim` counts
    only cached channels. `frames` is the window in latent frames. `cache` is the number of bits of the latent
    cache.

    Raises UsageError for an impossible size.
    """
    changes = {"window_frames": frames, "tokens_per_frame": tokens_per_frame}
    geometry = geometry.model_copy(update={k: v for k, v in changes.items() if v is not None})
    frames = geometry.window_frames
    for name, value in (("frames", frames), ("tokens_per_frame", geometry.tokens_per_frame)):
        if value <= 0:
            raise UsageError(f"{name} must be above 0, got {value}")
    dtype = checked("dtype", dtype.removeprefix("torch."))
    size = DTYPE_BYTES[dtype]
    parts = _rows(geometry, kv_lora_rank, qk_rope_head_dim)
    rows = [sum(part) for part in parts]
    dense_row = 2 * geometry.inner_dim
    dense_token = dense_row * geometry.num_layers * size
    latent_token = sum(row_bytes(cache, *part, size) for part in parts)

    label, total = gpu_memory(gpu)
    weights = geometry.parameters * size
    free = total - RESERVED_BYTES - weights

    def longest_window(token_bytes: int) -> int:
        def needed(window: int) -> int:
            return geometry.cached_tokens(window) * token_bytes + activation_bytes(geometry, window, size)

        return max(bisect.bisect_right(range(geometry.rope_max_seq_len + 1), free, key=needed) - 1, 0)

    tokens = geometry.cached_tokens(frames)
    mean_row = statistics.fmean(rows)
    working = activation_bytes(geometry, frames, size)
    return Plan(
        model=geometry.name,
        dtype=dtype,
        cache=format_bits(cache),
        frames=frames,
        tokens_per_frame=geometry.tokens_per_frame,
        seconds_of_context=geometry.seconds(frames),
        dense_scalars_per_token=dense_row,
        latent_scalars_per_token=int(mean_row) if mean_row.is_integer() else mean_row,
        latent_scalars_by_layer=rows,
        reduction=1 - mean_row / dense_row,
        dense_cache_bytes=tokens * dense_token,
        latent_cache_bytes=tokens * latent_token,
        activation_bytes=working,
        gpu=label,
        gpu_memory_bytes=total,
        reserved_bytes=RESERVED_BYTES,
        weights_bytes=weights,
        max_streams_dense=max(free // (tokens * dense_token + working), 0),
        max_streams_latent=max(free // (tokens * latent_token + working), 0),
        max_seconds_dense=geometry.seconds(longest_window(dense_token)),
        max_seconds_latent=geometry.seconds(longest_window(latent_token)),
        assumptions=[
            *_too_large(weights, total, label),
            f"{format_bytes(weights)} of weights shared by all streams; text encoder and VAE not included",
            f"{format_bytes(working)} of working memory per stream (computed for eager attention)",
            f"{format_bytes(RESERVED_BYTES)} reserved on the GPU; 1 GB = 10^9 bytes",
            f"the longest context is limited to {geometry.rope_max_seq_len} latent frames by the rotary table",
        ],
    )


def rows_by_layer(ranks: Sequence[int], key: int, layers_per_latent: int) -> list[tuple[int, int]]:
    """Scalars of latent and shared key that each layer caches, given its rank; those of a latent are its first layer's.

    Raises UsageError if the layers do not divide into latents.
    """
    layers = len(ranks)
    if layers % layers_per_latent:
        raise UsageError(
            f"{layers} layers cannot share latents {layers_per_latent} at a time; give a divisor of {layers}"
        )
    return [(0, 0) if layer % layers_per_latent else (rank, key) for layer, rank in enumerate(ranks)]


def _too_large(weights: int, total: int, gpu: str) -> list[str]:
    """What to do where the weights alone fill the GPU, so that no stream fits."""
    if weights + RESERVED_BYTES < total:
        return []
    return [
        f"no stream fits: the weights alone take {format_bytes(weights)} of the {format_bytes(total)} of {gpu}; give a "
        "larger --gpu, or generate with --offload, which keeps them in host memory"
    ]


def plan_table(plan: Plan) -> Table:
    """The plan as a table for a terminal."""
    cache = "" if plan.cache == "auto" else f" (latents {plan.cache})"
    table = Table(
        title=f"{plan.model}: {plan.frames} frames of {plan.tokens_per_frame} tokens, {plan.dtype}{cache}, {plan.gpu}",
        caption="\n".join(plan.assumptions),
        caption_justify="left",
        title_justify="left",
    )
    table.add_column("")
    for heading in ("dense", "latent", ""):
        table.add_column(heading, justify="right")
    table.add_row(
        "cached scalars per token per layer",
        f"{plan.dense_scalars_per_token:,}",
        f"{plan.latent_scalars_per_token:,g}",
        change_text(-plan.reduction, 1),
    )
    table.add_row(
        f"cache per stream ({plan.seconds_of_context:.1f} s)",
        format_bytes(plan.dense_cache_bytes),
        format_bytes(plan.latent_cache_bytes, like=plan.dense_cache_bytes),
        _times(plan.dense_cache_bytes, plan.latent_cache_bytes, "smaller", "larger"),
    )
    table.add_row("working memory per stream", *[format_bytes(plan.activation_bytes)] * 2, "")
    table.add_row(
        f"streams in {format_bytes(plan.gpu_memory_bytes)}",
        f"{plan.max_streams_dense:,}",
        f"{plan.max_streams_latent:,}",
        _times(plan.max_streams_latent, plan.max_streams_dense, "more", "fewer"),
    )
    table.add_row(
        "longest context of one stream",
        f"{plan.max_seconds_dense:,.0f} s",
        f"{plan.max_seconds_latent:,.0f} s",
        _times(plan.max_seconds_latent, plan.max_seconds_dense, "longer", "shorter"),
    )
    return table


def _times(better: float, worse: float, word: str, opposite: str) -> str:
    """Compare two sizes; `opposite` is for a conversion that makes it worse."""
    if not (better and worse):
        return ""
    times, found = factor(better / worse, word, opposite)
    return f"{times:.1f}x {found}"


def _rows(
    geometry: StreamGeometry, kv_lora_rank: int | Sequence[int], qk_rope_head_dim: int | Sequence[int]
) -> list[tuple[int, int]]:
    """The cached scalars of latent and shared key by layer. Raises UsageError for impossible sizes."""
    ranks, ropes = (
        [value] * geometry.num_layers if isinstance(value, int) else list(value)
        for value in (kv_lora_rank, qk_rope_head_dim)
    )
    for name, values in (("kv_lora_rank", ranks), ("qk_rope_head_dim", ropes)):
        if len(values) != geometry.num_layers:
            raise UsageError(
                f"{name} has {len(values)} entries for {geometry.num_layers} layers; give one value or one per layer"
            )
    limit = 2 * geometry.inner_dim
    # A latent shared by several layers is counted in the first of them; the others have rank 0.
    least, most = (0, limit * geometry.num_layers) if 0 in ranks and any(ranks) else (1, limit)
    for rank, rope in zip(ranks, ropes, strict=True):
        if not least <= rank <= most:
            raise UsageError(f"kv_lora_rank {rank} is out of range; keys and values of a layer have {limit} directions")
        if rope < 0 or rope % 2:
            raise UsageError(f"qk_rope_head_dim {rope} must be even and not negative; rotary channels come in pairs")
    return list(zip(ranks, ropes, strict=True))
