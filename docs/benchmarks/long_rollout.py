"""A rollout of 2,000 chunks: `python docs/benchmarks/long_rollout.py`.

Converts the digits teacher as the demo does, without training, and rolls the result out chunk by chunk; with
`--teacher` the teacher too, from the same noise and prompts. Measured on the way: the resident set of the process,
the largest rotary index that was looked up, the share of frames that show the prompted digit, and what the model
says 2,000 chunks on about a window that it saw after 20: the rows of that window are put back into the ring,
wherever their slots are by then, and the velocity must be the same to the bit. Writes `long_rollout.json`
and `long_rollout.md` beside itself; exits 1 if the memory grew by more than 1 % after the window had filled, an
index left the window or the velocity moved.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from mla_convert.convert import clip_batches, convert_model
from mla_convert.distill.data import DataConfig, open_data
from mla_convert.evaluate.rollouts import heldout_prompts
from mla_convert.families.wan import FAMILY
from mla_convert.load import load_dense, load_source
from mla_convert.mla.rope import RotaryTable
from mla_convert.recipe.load import load_recipe
from mla_convert.recipe.shipped import find_recipe
from mla_convert.run.stream import stream_chunks
from mla_convert.zoo.digits.classifier import classify
from mla_convert.zoo.digits.data import CLIP_FRAMES, FRAME, SHIFT

HERE = Path(__file__)
PROBED_AFTER = 20
SPANS = (1, 8, 64)
"""Where the digit is looked for beside the end, in multiples of the training length."""


def converted(teacher: Any) -> Any:
    """The digits teacher as `recipes/demo.yaml` converts it, untrained."""
    recipe = load_recipe(find_recipe("demo"))
    settings, convert = recipe.convert.calibration, recipe.convert
    data = open_data(DataConfig(kind="digits"), 0)
    batches = clip_batches(data.example, range(settings.clips), settings.batch_size)
    return convert_model(FAMILY, teacher, convert, batches, seed=recipe.seed)


class Watched(RotaryTable):
    """A table that keeps the largest frame index it was asked for."""

    longest = 0

    def rotations(self, frames: list[int], height: int, width: int) -> Tensor:
        Watched.longest = max([Watched.longest, *frames])
        return super().rotations(frames, height, width)


def watch(model: Any) -> list[Any]:
    """Make the model look its rotations up in a `Watched` table; the caches that it makes from now on."""
    table, caches, make = model.rotary_table(), [], model.init_cache
    watched = Watched(table.cis, table.axes)

    def kept(*args: Any, **kwargs: Any) -> Any:
        caches.append(make(*args, **kwargs))
        return caches[-1]

    model.rotary_table, model.init_cache = lambda: watched, kept
    Watched.longest = 0
    return caches


@torch.inference_mode()
def velocity(model: Any, cache: Any, text: Tensor, window: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
    """Velocity of a fixed noisy chunk behind the rows of the cache, or of `window` put in their place, and the rows."""
    causal, start = model.causal, cache.frames_seen
    slots = cache.slots(causal.history(start, start + causal.num_frames_per_block))
    for layer, rows in enumerate(window or []):
        cache.put(cache.kept(layer), slots, rows)
    held = [cache.take(cache.kept(layer), slots) for layer in range(len(cache.rows))]
    noise = torch.randn(1, 1, causal.num_frames_per_block, FRAME, FRAME, generator=torch.Generator().manual_seed(1))
    batch = (cache.batch_size, -1, -1, -1, -1)
    text = torch.cat([text, torch.zeros_like(text)])[: cache.batch_size]
    return model.forward_chunk(noise.expand(batch), torch.full(batch[:1], 500.0), text, cache), held


def rolled_out(model: Any, chunks: int, prompts: int, steps: int, guidance: float) -> dict[str, Any]:
    """What the head of this file says, of one model."""
    process, caches = psutil.Process(), watch(model)
    text, classes = heldout_prompts(prompts)
    bounds = model.causal.chunks(chunks * model.causal.num_frames_per_block)[:chunks]
    frames, correct, resident = bounds[-1][1], [], []
    # What lives by now lives on; without this every collection would walk through all of it.
    gc.freeze()
    seconds = time.process_time()
    rollout = stream_chunks(
        model, text, frames, FRAME, FRAME, num_inference_steps=steps, shift=SHIFT, guidance_scale=guidance
    )
    for number, chunk in enumerate(rollout, 1):
        correct.append(classify(chunk) == classes.unsqueeze(1))
        if number % 10 == 0:
            gc.collect()
            resident.append(process.memory_info().rss)
        if number % 100 == 0:
            print(f"{number} of {chunks} chunks, {time.process_time() - seconds:.0f} s", file=sys.stderr, flush=True)
        if number == PROBED_AFTER:
            before, window = velocity(model, caches[0], text, None)
    seconds = time.process_time() - seconds
    after, _ = velocity(model, caches[0], text, window)
    shown = torch.cat(correct, dim=1).double()
    spans = {f"{span}x": span * CLIP_FRAMES for span in SPANS if span * CLIP_FRAMES < frames} | {"end": frames}
    tenth = max(1, len(resident) // 10)
    filled, end = (statistics.median(part) for part in (resident[tenth : 2 * tenth], resident[-tenth:]))
    return {
        "chunks": len(bounds),
        "frames": frames,
        "cache_bytes": caches[0].bytes(),
        "rss_bytes_after_a_tenth": int(filled),
        "rss_bytes_end": int(end),
        "rss_bytes_every_10_chunks": resident,
        "growth": end / filled - 1,
        "largest_temporal_index": Watched.longest,
        "window_frames": model.causal.window_frames,
        "velocity_difference": float((after - before).abs().max()),
        "digit_accuracy": {name: float(shown[:, stop - CLIP_FRAMES : stop].mean()) for name, stop in spans.items()},
        "digit_accuracy_by_100_frames": [round(float(part.mean()), 4) for part in shown.split(100, dim=1)],
        "cpu_seconds": round(seconds, 1),
    }


def holds(found: dict[str, Any]) -> bool:
    """Whether memory, positions and the velocity stayed."""
    inside = found["largest_temporal_index"] < found["window_frames"]
    return inside and found["growth"] <= 0.01 and found["velocity_difference"] == 0


def table(result: dict[str, Any]) -> str:
    models = result["models"]
    first = next(iter(models.values()))
    settings = result["arguments"]

    def row(title: str, cell: Any) -> str:
        return f"| {title} | " + " | ".join(cell(found) for found in models.values()) + " |"

    lines = [
        f"| {settings['prompts']} rollouts, {settings['steps']} steps a chunk, guidance {settings['guidance']:g} | "
        + " | ".join(models)
        + " |",
        "| --- |" + " ---: |" * len(models),
        row("chunks (frames)", lambda found: f"{found['chunks']:,} ({found['frames']:,})"),
        row("bytes of the cache", lambda found: f"{found['cache_bytes']:,}"),
        row(
            "resident memory after a tenth of the chunks",
            lambda found: f"{found['rss_bytes_after_a_tenth'] / 1e6:.1f} MB",
        ),
        row(
            "resident memory at the end",
            lambda found: f"{found['rss_bytes_end'] / 1e6:.1f} MB ({100 * found['growth']:+.2f} %)",
        ),
        row(
            "largest temporal index of a window",
            lambda found: f"{found['largest_temporal_index']} of {found['window_frames']}",
        ),
        row(
            "velocity of one window, last chunk against chunk 20",
            lambda found: (
                "the same bits" if found["velocity_difference"] == 0 else f"{found['velocity_difference']:.1e}"
            ),
        ),
    ]
    for span in first["digit_accuracy"]:
        where = "at the end" if span == "end" else f"at {span} the training length"
        lines.append(
            row(
                f"frames that show the prompted digit {where}",
                lambda found, span=span: f"{100 * found['digit_accuracy'][span]:.0f} %",
            )
        )
    lines.append(row("CPU minutes, one core", lambda found: f"{found['cpu_seconds'] / 60:.1f}"))
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=2000)
    parser.add_argument(
        "--prompts", type=int, default=1, help="rollouts at once; guidance other than 1 doubles the batch"
    )
    parser.add_argument("--steps", type=int, default=2, help="denoising steps a chunk")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--teacher", action="store_true", help="the dense teacher too")
    arguments = parser.parse_args()
    teacher = load_dense(load_source("zoo:digits"))
    models = {"converted": converted(teacher)} | ({"dense teacher": teacher} if arguments.teacher else {})
    result: dict[str, Any] = {"torch": torch.__version__, "device": "cpu", "arguments": vars(arguments), "models": {}}
    for name, model in models.items():
        result["models"][name] = rolled_out(
            model, arguments.chunks, arguments.prompts, arguments.steps, arguments.guidance
        )
        HERE.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        HERE.with_suffix(".md").write_text(table(result), encoding="utf-8")
    print(table(result), end="")
    return int(not all(holds(found) for found in result["models"].values()))


if __name__ == "__main__":
    sys.exit(main())
