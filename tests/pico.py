"""Tiny random models, small enough that a test can build dozens of them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mla_convert.convert import CalibrationBatch, ConvertConfig, convert_model
from mla_convert.export.manifest import family_of
from mla_convert.families.anyflow_far import CausalAnyFlowFARTransformer3DModel
from mla_convert.families.skyreels_v2 import CausalSkyReelsV2Transformer3DModel
from mla_convert.families.wan import CausalWanTransformer3DModel

LAYOUTS = [
    {"position": "decoupled", "kv_lora_rank": 14, "qk_rope_head_dim": 6},
    {"position": "derived", "kv_lora_rank": 20, "qk_rope_head_dim": 8},
    {"position": "baked", "kv_lora_rank": 16, "qk_rope_head_dim": 4},
    {"position": "rotate_on_read", "kv_lora_rank": 20},
]
# What the stock constructors take; patches of 2x2, 2 latent channels and text of 8 channels in every family.
WAN = {
    "patch_size": (1, 2, 2),
    "in_channels": 2,
    "out_channels": 2,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 24,
}
BUILDERS: dict[str, Callable[..., Any]] = {
    "wan": functools.partial(CausalWanTransformer3DModel, **WAN),
    "anyflow_far": functools.partial(CausalAnyFlowFARTransformer3DModel, **WAN),
    "skyreels_v2": functools.partial(CausalSkyReelsV2Transformer3DModel, **WAN, inject_sample_info=True),
}
WINDOW = {"num_frames_per_block": 2, "window_frames": 5, "sink_frames": 1}
VARIANTS = [layout | {"own_chunk": own} for layout, own in itertools.product(LAYOUTS, ("exact", "latent"))]


def lossless(heads: int, head_dim: int, own_chunk: str) -> list[dict[str, Any]]:
    """Conversions that lose nothing: full rank, and a shared key for every pair of every head."""
    inner, temporal = heads * head_dim, head_dim - 4 * (head_dim // 6)
    shared = {"own_chunk": own_chunk, "keep_residual": False}
    rest = 2 * inner - heads * temporal
    return [
        {"position": "rotate_on_read", "own_chunk": own_chunk, "kv_lora_rank": 2 * inner},
        {"position": "derived", "kv_lora_rank": 2 * inner, "qk_rope_head_dim": inner, **shared},
        {"position": "decoupled", "kv_lora_rank": inner, "qk_rope_head_dim": inner, **shared},
        {"position": "baked", "kv_lora_rank": rest, "qk_rope_head_dim": heads * temporal, **shared},
    ]


def dense_model(
    heads: int = 2,
    head_dim: int = 12,
    layers: int = 2,
    causal: dict[str, Any] | None = WINDOW,
    seed: int = 0,
    family: str = "wan",
    **changes: Any,
) -> Any:
    """A dense causal model of a family in BUILDERS; `changes` go to its constructor.

    `causal` None leaves the window to the family.

    Biases and QK-norm gains are random too, so that mistakes with them show up.
    """
    torch.manual_seed(seed)
    model = BUILDERS[family](
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=layers,
        causal=causal,
        **changes,
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm_" in name:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def inputs(batch: int, frames: int, height: int, width: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Latents `[B, 2, F, H, W]`, timesteps `[B, F]` and text `[B, 3, 8]`."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 2, frames, height, width, generator=generator),
        1000 * torch.rand(batch, frames, generator=generator),
        torch.randn(batch, 3, 8, generator=generator),
    )


def batches(frames: int = 8, height: int = 6, width: int = 4) -> list[CalibrationBatch]:
    """Two batches of random calibration clips."""
    drawn = [inputs(4, frames, height, width, seed) for seed in (10, 11)]
    return [CalibrationBatch(latents, text) for latents, _, text in drawn]


def batches_of_unequal_size(**size: int) -> list[CalibrationBatch]:
    """A batch of four random calibration clips and one of a single clip."""
    first, second = batches(**size)
    return [first, CalibrationBatch(second.latents[:1], second.encoder_hidden_states[:1])]


def calibration(**settings: Any) -> dict[str, Any]:
    """The settings of a small calibration."""
    return {"clips": 8, "batch_size": 4, "queries_per_chunk": 4, **settings}


def convert(dense: Any, **settings: Any) -> Any:
    """`dense` converted with a small calibration."""
    config = ConvertConfig(calibration=calibration(queries_per_chunk=8), **settings)
    return convert_model(family_of(type(dense)), dense, config, batches())


def stream(model: Any, latents: Tensor, timestep: Tensor, text: Tensor, **conditions: Tensor) -> tuple[Tensor, Any]:
    """Stream the clip chunk by chunk and write every chunk to the cache; returns the velocity and the cache."""
    cache = model.init_cache(len(latents), *latents.shape[3:])
    chunks = [
        model.forward_chunk(latents[:, :, a:b], timestep[:, a:b], text, cache, write=True, **conditions)
        for a, b in model.causal.chunks(latents.shape[2])
    ]
    return torch.cat(chunks, dim=2), cache


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest magnitude."""
    return float((actual - expected).abs().max() / expected.abs().max())
