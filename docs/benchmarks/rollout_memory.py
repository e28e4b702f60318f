"""Memory of a rollout ten windows long: `python docs/benchmarks/rollout_memory.py`.

A random model with Wan's shapes at a quarter of the width (8 heads x 64, 4 layers, 96 tokens a
frame, window of 12 frames) is rolled out chunk by chunk, dense and latent, and the resident set of
the process is read after every chunk. Prints one JSON object and exits 1 if either rollout holds
more than 1 % more at its end than when its window had filled.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
from typing import Any

import psutil
import torch

from mla_convert.convert import ConvertConfig, convert_model
from mla_convert.families.wan import FAMILY, CausalWanTransformer3DModel

CAUSAL = {"num_frames_per_block": 3, "window_frames": 12, "sink_frames": 3}
WINDOWS = 10
HEIGHT, WIDTH = 16, 24


def dense_model() -> CausalWanTransformer3DModel:
    torch.manual_seed(0)
    shape = {"num_attention_heads": 8, "attention_head_dim": 64, "ffn_dim": 1024, "num_layers": 4}
    model = CausalWanTransformer3DModel(**shape, in_channels=16, text_dim=64, causal=CAUSAL)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def rollout(model: Any) -> dict[str, Any]:
    process, chunk = psutil.Process(), CAUSAL["num_frames_per_block"]
    cache = model.init_cache(1, HEIGHT, WIDTH)
    text = torch.randn(1, 8, 64)
    resident = []
    for _ in range(WINDOWS * CAUSAL["window_frames"] // chunk):
        x = torch.randn(1, 16, chunk, HEIGHT, WIDTH)
        model.forward_chunk(x, torch.tensor([500.0]), text, cache)
        model.forward_chunk(x, torch.tensor([0.0]), text, cache, write=True)
        gc.collect()
        resident.append(process.memory_info().rss)
    window = CAUSAL["window_frames"] // chunk
    filled = statistics.median(resident[window : 2 * window])
    end = statistics.median(resident[-window:])
    return {
        "cache_bytes": cache.bytes(),
        "scalars_per_token": cache.scalars_per_token(),
        "rss_bytes_window_filled": int(filled),
        "rss_bytes_end": int(end),
        "growth": end / filled - 1,
        "frames": cache.frames_seen,
    }


def main() -> int:
    dense = dense_model()
    latent = convert_model(FAMILY, dense, ConvertConfig(init="svd", kv_lora_rank=74))
    result = {"torch": torch.__version__, "dense": rollout(dense), "latent": rollout(latent)}
    print(json.dumps(result, indent=2))
    return int(any(result[kind]["growth"] > 0.01 for kind in ("dense", "latent")))


if __name__ == "__main__":
    sys.exit(main())
