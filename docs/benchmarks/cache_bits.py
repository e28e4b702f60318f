"""What bits of the cache are worth at equal bytes, before any training: `python docs/benchmarks/cache_bits.py`.

Converts an embedded teacher and streams held-out clips through the cache itself, chunk by chunk: a chunk is denoised at
one noise level against the rows that its clean forerunners left, in bfloat16, in int8 or in 8 and 4 bits
(`streaming.cache`). The loss is against that of the dense teacher, streamed alike with its cache in float32, on the
same noise. Every row is fitted twice, by one probe and the least ridge, which are the defaults, and by the `probes`
and `ridge` of the recipes for published models. Writes `cache_bits.json` and `cache_bits.md` beside itself; on one
thread it takes some ten minutes. `--model zoo:natural --data FOLDER` takes the teacher of natural video and what
`python -m mla_convert.zoo.natural.data --out FOLDER` has written, and writes `cache_bits-natural.*`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from layouts import data_of, signed
from ranks import BATCH, build
from torch import Tensor

from mla_convert.convert import ConvertConfig, clip_batches
from mla_convert.convert.blocks import ModelBlocks
from mla_convert.convert.layers import Plans, convert_layers
from mla_convert.distill.data import Data
from mla_convert.distill.objective import NoisedClips, noised_clips
from mla_convert.flow import NUM_TRAIN_TIMESTEPS
from mla_convert.load import load_dense, load_source
from mla_convert.mla.bits import parse_bits, row_bytes
from mla_convert.recipe.schema import validate
from mla_convert.run.streaming import StreamingConfig

FITS = {"default": {"probes": 1, "ridge": 1e-6}, "probes 4, ridge 0.05": {"probes": 4, "ridge": 0.05}}
FEW = {"clips": 8, "batch_size": 1, "max_tokens": 1229}
BFLOAT16 = "bfloat16"


class Row(NamedTuple):
    """A latent of `rank` for so many `layers`, cached as `cache` says; `calibration` beside the seed's clips."""

    layers: int
    rank: int
    cache: str
    calibration: dict[str, int] = {}


ROWS = [
    Row(4, 32, BFLOAT16),
    Row(4, 60, "int8"),
    Row(4, 88, "24x8,64x4"),
    Row(4, 44, "12x8,32x4"),
    Row(4, 56, BFLOAT16),
    Row(4, 108, "int8"),
    Row(4, 112, BFLOAT16, FEW),
    Row(1, 14, BFLOAT16),
    Row(1, 26, "int8"),
    Row(1, 36, "12x8,24x4"),
    Row(1, 28, BFLOAT16),
    Row(1, 54, "int8"),
    Row(1, 80, "20x8,60x4"),
]


def plans_of(teacher: Any, data: Data, layers: int, rank: int, seed: int, calibration: dict[str, Any]) -> Any:
    """The fits of all layers, whose first latents are the fits of smaller ranks; every seed draws clips of its own."""
    settings = {"max_tokens": 65536, "seed": seed, **calibration}
    config = ConvertConfig(kv_lora_rank=rank, layers_per_latent=layers, calibration=settings)
    clips = config.calibration.clips
    batches = clip_batches(data.example, range(seed * clips, (seed + 1) * clips), config.calibration.batch_size)
    blocks, plans = ModelBlocks(teacher), Plans()
    convert_layers(blocks, config, batches, seed, plans)
    return config, [plans.get(layer) for layer in range(len(blocks))]


def heldout(teacher: Any, data: Data, count: int) -> list[NoisedClips]:
    clips, generator = data.heldout(count), torch.Generator().manual_seed(0)
    pieces = zip(*(clips[key].split(BATCH) for key in ("latents", "encoder_hidden_states")), strict=True)
    return [noised_clips(x, text, teacher.causal, generator, noise_range=teacher.noise_range) for x, text in pieces]


def streamed(model: Any, clips: NoisedClips, dtype: torch.dtype | None = None) -> tuple[Tensor, int]:
    """Velocity `[B, C, F, H, W]` through the cache, and the bytes of a token in it."""
    assert clips.context is not None and clips.t_context is not None
    cache = model.init_cache(len(clips.x_t), *clips.x_t.shape[3:], dtype=dtype)
    found = []
    for start, stop in model.causal.chunks(clips.x_t.shape[2]):
        noisy, clean = clips.x_t[:, :, start:stop], clips.context[:, :, start:stop]
        times = clips.t[:, start:stop] * NUM_TRAIN_TIMESTEPS
        found.append(model.forward_chunk(noisy, times, clips.text, cache))
        model.forward_chunk(clean, clips.t_context * NUM_TRAIN_TIMESTEPS, clips.text, cache, write=True)
    tokens = len(clips.x_t) * model.causal.window_frames * cache.height * cache.width
    return torch.cat(found, dim=2), cache.bytes() // tokens


def measure(teacher: Any, clips: list[NoisedClips], expected: list[Tensor], model: Any, cache: str) -> dict[str, Any]:
    """`loss_increase`, `velocity_rel_error` and `bytes` of a converted model with a cache."""
    whole = cache == BFLOAT16
    validate(StreamingConfig, {"cache": "auto" if whole else parse_bits(cache)}).apply(model)
    loss = least = error = energy = 0.0
    for inputs, velocity in zip(clips, expected, strict=True):
        out, token = streamed(model, inputs, torch.bfloat16 if whole else None)
        loss += float((out - inputs.target).double().square().sum())
        least += float((velocity - inputs.target).double().square().sum())
        error += float((out - velocity).double().square().sum())
        energy += float(velocity.double().square().sum())
    parts = [model.mla.row_parts(layer) for layer in range(len(model.blocks))]
    assert token == sum(row_bytes(model.cache_bits, *part, 2) for part in parts)
    return {"loss_increase": loss / least - 1, "velocity_rel_error": (error / energy) ** 0.5, "bytes": token}


@torch.no_grad()
def measure_all(chosen: argparse.Namespace) -> dict[str, Any]:
    teacher, data = load_dense(load_source(chosen.model)), data_of(chosen.data)
    clips = heldout(teacher, data, chosen.heldout)
    expected = [streamed(teacher, inputs)[0] for inputs in clips]
    dense = streamed(teacher, clips[0], torch.bfloat16)[1]
    runs: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for few, layers in sorted({(bool(row.calibration), row.layers) for row in ROWS}):
        rows = [(i, row) for i, row in enumerate(ROWS) if (bool(row.calibration), row.layers) == (few, layers)]
        largest = max(row.rank for _, row in rows)
        for fit, settings in FITS.items():
            for seed in range(chosen.seeds):
                more = {"clips": chosen.clips, **rows[0][1].calibration, **settings}
                config, plans = plans_of(teacher, data, layers, largest, seed, more)
                for index, row in rows:
                    smaller = config.model_copy(update={"kv_lora_rank": row.rank})
                    model = build(teacher, smaller, [plan.truncated(row.rank) for plan in plans])
                    runs.setdefault((index, fit), []).append(measure(teacher, clips, expected, model, row.cache))
                    print(fit, seed, row, runs[index, fit][-1], file=sys.stderr, flush=True)
    found = []
    for index, row in enumerate(ROWS):
        entry: dict[str, Any] = {**row._asdict(), "bytes": runs[index, next(iter(FITS))][0]["bytes"]}
        for fit in FITS:
            for key in ("loss_increase", "velocity_rel_error"):
                values = [run[key] for run in runs[index, fit]]
                spread = {"median": statistics.median(values), "min": min(values), "max": max(values)}
                entry.setdefault(fit, {})[key] = spread
        found.append(entry)
    return {"dense_bytes": dense, "rows": found}


def table(found: dict[str, Any]) -> str:
    fits = "".join(f" | loss, {fit} | velocity error" for fit in FITS)
    lines = [
        f"| latent | cached as | bytes a token | dense bf16 over it{fits} |",
        "| --- | --- | ---: | ---: |" + " ---: | ---: |" * len(FITS),
    ]
    for row in found["rows"]:
        latent = f"{row['rank']} for {row['layers']} layers" if row["layers"] > 1 else f"{row['rank']} a layer"
        latent += f", {row['calibration']['clips']} clips" if row["calibration"] else ""
        kept = row["cache"] if row["cache"] in (BFLOAT16, "int8") else f"`{row['cache']}`"
        cells = [latent, kept, str(row["bytes"]), f"{found['dense_bytes'] / row['bytes']:.0f}x"]
        for fit in FITS:
            loss = row[fit]["loss_increase"]
            cells.append(f"{signed(loss['median'])} ({signed(loss['min'])} to {signed(loss['max'])})")
            cells.append(f"{100 * row[fit]['velocity_rel_error']['median']:.2f} %")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="zoo:digits")
    parser.add_argument("--data", metavar="FOLDER", help="latents of the natural clips")
    parser.add_argument("--clips", type=int, default=64, help="for calibration, where a row does not say")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--heldout", type=int, default=64)
    chosen = parser.parse_args()
    name = chosen.model.partition(":")[2]
    started, here = time.monotonic(), Path(__file__).with_stem("cache_bits" + ("" if name == "digits" else f"-{name}"))
    found = measure_all(chosen)
    arguments = {key: value for key, value in vars(chosen).items() if key != "data"}
    result = {"torch": torch.__version__, "device": "cpu", "arguments": arguments, **found}
    result["seconds"] = round(time.monotonic() - started)
    here.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    here.with_suffix(".md").write_text(table(found), encoding="utf-8")
    print(table(found), end="")


if __name__ == "__main__":
    main()
