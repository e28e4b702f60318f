"""What `inspect` finds in the embedded teacher, and what a layer costs it: `python docs/benchmarks/inspect_teacher.py`.

Writes `inspect-digits.json` and the tables `inspect-digits.md` beside itself.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch

from mla_convert.evaluate.spectrum import gram_spectrum
from mla_convert.export.manifest import versions
from mla_convert.pipeline.inspection import inspect_source

RANKS = (8, 16, 24, 28, 56)
MIDDLE = "28"
SHAPES = {"3072 x 1536 (Wan2.1-1.3B)": 1536, "10240 x 5120 (14B)": 5120}
SVD_WIDTH = 1536


def cost(width: int) -> dict[str, float | None]:
    """CPU seconds of the spectrum of bfloat16 `[W_K; W_V]`, and of an SVD where that is small."""
    weights = [torch.randn(width, width).bfloat16() for _ in "kv"]
    gram_spectrum(*(weight[:64, :64] for weight in weights))
    start = time.process_time()
    gram_spectrum(*weights)
    seconds = time.process_time() - start
    svd = None
    if width <= SVD_WIDTH:
        start = time.process_time()
        torch.linalg.svdvals(torch.cat(weights).double())
        svd = time.process_time() - start
    return {"seconds": seconds, "svd_seconds": svd}


def tables(found: dict[str, Any]) -> str:
    """Ranks by layer, predicted errors by layout, cost by shape."""
    lines = [
        "| layer | weights | keys, values | output | at rank 28: weights, keys and values, output "
        "| rotary pairs that matter |",
        "| ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for row in found["inspect"]["layers"]:
        needs = " | ".join(str(row[f"rank99_{name}"]) for name in ("weight", "activation", "output"))
        weights, activations, output = (
            100 * row[key][MIDDLE] for key in ("energy_at", "energy_at_activation", "energy_at_output")
        )
        pairs = ", ".join(f"{pair['axis']}{pair['pair']} {100 * pair['share']:.0f} %" for pair in row["rope_pairs"][:4])
        lines.append(f"| {row['layer']} | {needs} | {weights:.1f} %, {activations:.1f} %, {output:.2f} % | {pairs} |")
    heads = [f"{rank} scalars" for rank in RANKS]
    lines += ["", f"| predicted velocity error | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
    for layout, errors in found["inspect"]["predicted"].items():
        cells = ("" if error is None else f"{100 * error:.2g} %" for error in errors.values())
        lines.append(f"| `{layout}` | {' | '.join(cells)} |")
    trial = found["inspect"]["measured"]
    lines += ["", "| the trial | scalars | off on held-out handwriting |", "| --- | ---: | ---: |"]
    error = 100 * trial["velocity_rel_error"]
    lines.append(f"| `{trial['position']}` | {trial['scalars']} | {error:.1f} % |")
    lines += [
        "",
        "| `[W_K; W_V]` | CPU seconds a layer | by an SVD |",
        "| --- | ---: | ---: |",
    ]
    for shape, spent in found["cost"].items():
        svd = "" if spent["svd_seconds"] is None else f"{spent['svd_seconds']:.1f}"
        lines.append(f"| {shape} | {spent['seconds']:.1f} | {svd} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    here, start = Path(__file__).parent, time.process_time()
    found = inspect_source("zoo:digits", None, None, None, None, RANKS, None, lambda *told: None)
    spent = time.process_time() - start
    costs = {}
    for shape, width in SHAPES.items():
        # In a process of its own: what ran before leaves its threads and caches behind.
        with multiprocessing.get_context("spawn").Pool(1) as alone:
            costs[shape] = alone.apply(cost, (width,))
    result = {"device": "cpu", "threads": torch.get_num_threads(), "versions": versions()}
    result |= {"cpu_seconds": spent, "inspect": found, "cost": costs}
    (here / "inspect-digits.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (here / "inspect-digits.md").write_text(tables(result), encoding="utf-8")
    print(tables(result), end="")


if __name__ == "__main__":
    main()
