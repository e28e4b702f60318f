"""Models with two layers and two heads of twelve channels, for tests that use real files."""

from __future__ import annotations

from typing import Any

import torch

from mla_convert.families.wan import CausalWanTransformer3DModel, MLAWanTransformer3DModel

CAUSAL = {"num_frames_per_block": 2, "window_frames": 6, "sink_frames": 2}
STOCK = {
    "patch_size": (1, 4, 4),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 1,
    "out_channels": 1,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
PAIRS: dict[str, dict[str, Any]] = {
    "rotate_on_read": {"rope_pairs": [[], []], "nope_pairs": [[], []]},
    "decoupled": {"rope_pairs": [[0, 2, 4], [0, 2, 4]], "nope_pairs": [[1, 3, 5], [1, 3, 5]]},
    "derived": {"rope_pairs": [[0, 2, 4], [0, 2, 4]], "nope_pairs": [[1, 3, 5], [1, 3, 5]]},
    "baked": {"rope_pairs": [[0, 1], [0, 1]], "nope_pairs": [[2, 3, 4, 5], [2, 3, 4, 5]]},
}


def pico_dense(seed: int = 0, **changes: Any) -> CausalWanTransformer3DModel:
    torch.manual_seed(seed)
    return CausalWanTransformer3DModel(**{**STOCK, "causal": CAUSAL, **changes}).eval()


def pico_mla(seed: int = 0, position: str = "rotate_on_read", **changes: Any) -> MLAWanTransformer3DModel:
    """A converted model with ranks 10 and 8; `changes` go into its `mla` section."""
    torch.manual_seed(seed)
    mla = {"position": position, "own_chunk": "exact", "kv_lora_rank": [10, 8], "v_head_dim": 12, **PAIRS[position]}
    return MLAWanTransformer3DModel(**STOCK, causal=CAUSAL, mla={**mla, **changes}).eval()


def pico_velocity(model: torch.nn.Module) -> torch.Tensor:
    """Velocity `[1, 1, 4, 8, 8]` of a fixed clip of four frames."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 1, 4, 8, 8, generator=generator).to(model.dtype)
    text = torch.randn(1, 3, 8, generator=generator).to(model.dtype)
    with torch.no_grad():
        return model(latents, torch.tensor([500.0]), text).sample
