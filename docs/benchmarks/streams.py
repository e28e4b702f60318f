"""Streams against memory, and 64 streams against 64 single runs: `python docs/benchmarks/streams.py`.

The digits teacher, dense, and as the demo converts it, without training.

Equality: 64 rollouts, every fourth with guidance, join a `StreamBatch` over four rounds and end at different times.
Each is then rolled out alone with the same seed, and the largest difference in its frames is set against their
largest magnitude. Throughput is taken from the same rollouts: CPU seconds of the batch, and of the single runs one
after the other.

Memory: a process of its own fills the windows of some numbers of streams. The pool's bytes are what `plan` says,
times the lanes; the resident set is read before the pool is made and when the windows are full. The slope between
the smallest and the largest number is what a stream really costs while a pass takes 16 lanes.
Writes `streams.json` and `streams.md` beside itself; exits 1 if the bytes are not the plan's or a stream differs
from its single run by more than TOLERANCE.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from long_rollout import converted
from torch import Tensor

from mla_convert.evaluate.geometry import from_model
from mla_convert.evaluate.memory import plan
from mla_convert.evaluate.rollouts import chosen_prompts, heldout_prompts
from mla_convert.families.wan import CausalWanTransformer3DModel, MLAWanTransformer3DModel
from mla_convert.load import load_dense, load_source
from mla_convert.recipe.load import load_recipe
from mla_convert.recipe.shipped import find_recipe
from mla_convert.run.batch import StreamBatch
from mla_convert.run.stream import stream_chunks
from mla_convert.zoo.digits.data import FRAME, GUIDANCE, SHIFT

HERE = Path(__file__)
STREAMS, STEPS = 64, 2
LANES = (16, 256)
LANES_PER_PASS = 16
TOLERANCE = 1e-3
"""Of a rollout's largest magnitude, float32: sums of other orders, some 1e-6 a pass, fed back for some chunks."""


def lengths() -> list[int]:
    """Frames of each stream, in windows of 10."""
    return [13 + 3 * (index % 3) for index in range(STREAMS)]


def scale(index: int) -> float:
    return GUIDANCE if index % 4 == 0 else 1.0


def batched(model: Any, text: Tensor) -> tuple[list[Tensor], float, int]:
    """The rollouts as streams of one batch, the CPU seconds, and the bytes of the pool."""
    lanes = STREAMS + sum(scale(index) != 1 for index in range(STREAMS))
    batch = StreamBatch(model, lanes, FRAME, FRAME, num_inference_steps=STEPS, shift=SHIFT)
    made: list[list[Tensor]] = [[] for _ in range(STREAMS)]
    waiting = list(range(STREAMS))
    seconds = time.process_time()
    while waiting or batch.active:
        joining, waiting = waiting[: STREAMS // 4], waiting[STREAMS // 4 :]
        for index in joining:
            batch.join(text[index], seed=index, num_frames=lengths()[index], guidance_scale=scale(index))
        for chunk in batch.step():
            made[chunk.stream].append(chunk.latents)
    return [torch.cat(chunks, dim=1) for chunks in made], time.process_time() - seconds, batch.bytes()


def alone(model: Any, text: Tensor) -> tuple[list[Tensor], float]:
    """The same rollouts one after the other, and the CPU seconds."""
    made, seconds = [], time.process_time()
    for index, frames in enumerate(lengths()):
        chunks = stream_chunks(
            model,
            text[index : index + 1],
            frames,
            FRAME,
            FRAME,
            num_inference_steps=STEPS,
            shift=SHIFT,
            seed=index,
            guidance_scale=scale(index),
        )
        made.append(torch.cat(list(chunks), dim=2)[0])
    return made, time.process_time() - seconds


def planned(model: Any) -> int:
    """Bytes of one stream's cache as `mla-convert plan` has them."""
    geometry, rows = from_model(model, FRAME, FRAME, 8, 1)
    return plan(geometry, rows, dtype="float32").latent_cache_bytes


def compared(model: Any) -> dict[str, Any]:
    text, _ = heldout_prompts(STREAMS)
    streams, together, pool = batched(model, text)
    singles, one_by_one = alone(model, text)
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(streams, singles, strict=True)]
    frames = sum(lengths())
    return {
        "streams": STREAMS,
        "frames": frames,
        "largest_relative_error": max(errors),
        "bitwise_equal": sum(torch.equal(a, b) for a, b in zip(streams, singles, strict=True)),
        "pool_bytes": pool,
        "planned_bytes_a_lane": planned(model),
        "lanes": pool // planned(model),
        "cpu_seconds_batched": round(together, 2),
        "cpu_seconds_one_by_one": round(one_by_one, 2),
        "ratio": round(one_by_one / together, 3),
    }


def empty_model(kind: str) -> Any:
    """The shapes alone, which is what memory depends on."""
    config = dict(load_source("zoo:digits").config)
    if kind == "dense":
        return CausalWanTransformer3DModel(**config).eval()
    convert = load_recipe(find_recipe("demo")).convert
    layers, pairs = config["num_layers"], config["attention_head_dim"] // 2
    mla = {
        "position": convert.position,
        "own_chunk": convert.own_chunk,
        "kv_lora_rank": (convert.kv_lora_rank,) * layers,
        "layers_per_latent": convert.layers_per_latent,
        "v_head_dim": config["attention_head_dim"],
        "rope_pairs": ((),) * layers,
        "nope_pairs": (tuple(range(pairs)),) * layers,
    }
    return MLAWanTransformer3DModel(mla=mla, **config).eval()


def resident(kind: str) -> list[dict[str, int]]:
    """Bytes that pools of LANES add to the resident set when the windows of as many streams have filled."""
    model, process = empty_model(kind), psutil.Process()
    text, start = chosen_prompts(1)[0].embedding(), torch.zeros(1, model.causal.window_frames, FRAME, FRAME)

    def full(lanes: int) -> tuple[StreamBatch, int]:
        gc.collect()
        before = process.memory_info().rss
        batch = StreamBatch(model, lanes, FRAME, FRAME, lanes_per_pass=LANES_PER_PASS)
        for seed in range(lanes):
            batch.join(text, seed=seed, start=start)
        while batch.step()[0].first + model.causal.num_frames_per_block < model.causal.window_frames:
            pass
        gc.collect()
        return batch, process.memory_info().rss - before

    # What the first passes allocate for good is not a stream's.
    full(LANES_PER_PASS)
    found = []
    for lanes in LANES:
        batch, added = full(lanes)
        found.append({"lanes": lanes, "pool_bytes": batch.bytes(), "rss_bytes": added})
        del batch
    return found


def filled(kind: str) -> list[dict[str, int]]:
    """`resident` in a process of its own."""
    # What is freed goes back to the system at once, so that the resident set is what is held.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, str(HERE), "--fill", kind], check=True, stdout=subprocess.PIPE, env=env)
    found: list[dict[str, int]] = json.loads(done.stdout)
    return found


def table(result: dict[str, Any]) -> str:
    kinds = result["models"]

    def row(title: str, cell: Any) -> str:
        return f"| {title} | " + " | ".join(cell(found) for found in kinds.values()) + " |"

    lines = [
        "| digits model, float32 | " + " | ".join(kinds) + " |",
        "| --- |" + " ---: |" * len(kinds),
        row("bytes of a lane in the plan", lambda found: f"{found['equality']['planned_bytes_a_lane']:,}"),
    ]
    for index, lanes in enumerate(LANES):
        lines.append(
            row(f"bytes of a pool of {lanes:,} lanes", lambda found, i=index: f"{found['memory'][i]['pool_bytes']:,}")
        )
        lines.append(
            row(
                f"resident memory that {lanes:,} streams added",
                lambda found, i=index: f"{found['memory'][i]['rss_bytes'] / 1e6:.1f} MB",
            )
        )
    lines += [
        row("resident memory of one more stream", lambda found: f"{found['rss_bytes_a_stream'] / 1e3:.1f} kB"),
        row(
            f"{STREAMS} streams against single runs, largest difference",
            lambda found: f"{found['equality']['largest_relative_error']:.1e}",
        ),
        row("of these equal to the bit", lambda found: f"{found['equality']['bitwise_equal']}"),
        row(
            "frames a CPU second, batched",
            lambda found: f"{found['equality']['frames'] / found['equality']['cpu_seconds_batched']:.1f}",
        ),
        row(
            "frames a CPU second, one by one",
            lambda found: f"{found['equality']['frames'] / found['equality']['cpu_seconds_one_by_one']:.1f}",
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fill", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=["equality", "memory"], help="measure one, keep the other as it was")
    arguments = parser.parse_args()
    if arguments.fill:
        print(json.dumps(resident(arguments.fill)))
        return 0
    result: dict[str, Any] = {"models": {"dense": {}, "latent": {}}}
    if arguments.only:
        result = json.loads(HERE.with_suffix(".json").read_text(encoding="utf-8"))
    result |= {"torch": torch.__version__, "device": "cpu"}
    if arguments.only != "equality":
        for kind, found in result["models"].items():
            few, *_, many = found["memory"] = filled(kind)
            found["rss_bytes_a_stream"] = round((many["rss_bytes"] - few["rss_bytes"]) / (many["lanes"] - few["lanes"]))
    if arguments.only != "memory":
        teacher = load_dense(load_source("zoo:digits"))
        result["models"]["dense"]["equality"] = compared(teacher)
        result["models"]["latent"]["equality"] = compared(converted(teacher))
    HERE.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    HERE.with_suffix(".md").write_text(table(result), encoding="utf-8")
    print(table(result), end="")
    equal = all(found["equality"]["largest_relative_error"] <= TOLERANCE for found in result["models"].values())
    as_planned = all(
        pool["pool_bytes"] == pool["lanes"] * found["equality"]["planned_bytes_a_lane"]
        for found in result["models"].values()
        for pool in (*found["memory"], found["equality"])
    )
    return int(not (equal and as_planned))


if __name__ == "__main__":
    sys.exit(main())
