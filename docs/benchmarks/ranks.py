"""Loss before training against cached scalars, by layout: `python docs/benchmarks/ranks.py`.

`--model zoo:natural --data FOLDER` takes the other teacher. One calibration seed and eight sizes a
construction; the shared key of the layouts that cache one takes between a seventh and a quarter of the row.
Writes `ranks-NAME.json`, the table `ranks-NAME.md` and the plot `ranks-NAME.svg` beside itself; a killed
run goes on with the rows that are not in the file, `--draw` makes table and plot again from it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import plots
import torch
from layouts import measure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from mla_convert.distill.data import DataConfig, open_data
from mla_convert.evaluate.figures import MUTED, RUNS, Chart
from mla_convert.load import load_dense, load_source

SIZES = (8, 14, 20, 28, 40, 56, 96, 192)
CONSTRUCTIONS: dict[str, dict[str, Any]] = {
    "decoupled, latent, svd (the paper's)": {"position": "decoupled", "own_chunk": "latent", "init": "svd"},
    "decoupled, exact, activation": {"position": "decoupled", "own_chunk": "exact", "init": "activation"},
    "derived, exact, activation": {"position": "derived", "own_chunk": "exact", "init": "activation"},
    "rotate_on_read, exact, activation": {"position": "rotate_on_read", "own_chunk": "exact", "init": "activation"},
}
COLOURS = (RUNS[1], RUNS[2], RUNS[5], RUNS[0])
DENSE = 384


def row(construction: dict[str, Any], scalars: int) -> dict[str, Any]:
    """A conversion that caches so many scalars a token."""
    if construction["position"] == "rotate_on_read":
        return {**construction, "kv_lora_rank": scalars}
    if construction["position"] == "derived":
        return {**construction, "kv_lora_rank": scalars, "qk_rope_head_dim": 32}
    shared = 2 * max(1, min(16, scalars // 8))
    return {**construction, "kv_lora_rank": scalars - shared, "qk_rope_head_dim": shared}


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Loss rise by construction and cached scalars."""
    sizes = [f"{entry['scalars']:g}" for entry in next(iter(found.values()))]
    lines = [f"| cached scalars of 384 | {' | '.join(sizes)} |", f"| --- |{' ---: |' * len(sizes)}"]
    lines += [
        f"| {name} | {' | '.join(percent(e['loss_increase']) for e in entries)} |" for name, entries in found.items()
    ]
    return "\n".join(lines) + "\n"


def percent(share: float) -> str:
    return f"{100 * share:+.0f} %" if abs(share) >= 0.1 else f"{100 * share:+.2f} %"


def plot(found: dict[str, list[dict[str, Any]]]) -> str:
    """Loss rise over cached scalars, both logarithmic, with the share of the dense cache above; SVG."""
    with Chart("ranks", (9, 4.4)) as chart:
        axes = chart.axes
        for (name, entries), colour in zip(found.items(), COLOURS, strict=False):
            points = [(e["scalars"], 100 * e["loss_increase"]) for e in entries if e["loss_increase"] > 0]
            axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, label=name)
        axes.axvline(28, color=MUTED, linewidth=1, dashes=(2, 3))
        axes.set(
            xscale="log", yscale="log", xlabel="cached scalars a token a layer (dense: 384; dashed: VideoMLA's share)"
        )
        axes.set_ylabel("held-out loss above the teacher's")
        axes.set_xticks(SIZES, [str(size) for size in SIZES])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.yaxis.set_minor_locator(NullLocator())
        above = axes.secondary_xaxis("top")
        above.set_xticks(SIZES, [f"{100 * size / DENSE:.3g} %" for size in SIZES])
        above.xaxis.set_minor_formatter(NullFormatter())
        above.set_xlabel("share of the dense cache")
        axes.legend(frameon=False)
    return chart.svg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="zoo:digits")
    parser.add_argument("--data", help="folder of latents; the digits teacher makes its own clips")
    parser.add_argument("--clips", type=int, default=64, help="calibration clips, a multiple of 16")
    parser.add_argument("--heldout", type=int, default=64)
    parser.add_argument("--draw", action="store_true", help="only the table and the plot")
    chosen = parser.parse_args()
    folder, stem = Path(__file__).parent, f"ranks-{chosen.model.split(':')[-1]}"
    path = folder / f"{stem}.json"
    if not chosen.draw:
        measure_all(chosen, path)
    found = json.loads(path.read_text())["rows"]
    (folder / f"{stem}.md").write_text(table(found))
    plots.save(plot(found), folder / f"{stem}.svg")
    print(table(found), end="")


def measure_all(chosen: argparse.Namespace, path: Path) -> None:
    """Measure every row that `path` does not have yet with the same arguments."""
    arguments = {name: value for name, value in vars(chosen).items() if name != "draw"}
    result: dict[str, Any] = {"torch": torch.__version__, "device": "cpu", "arguments": arguments, "rows": {}}
    if path.is_file():
        before = json.loads(path.read_text())
        if {key: before[key] for key in ("torch", "arguments")} == {key: result[key] for key in ("torch", "arguments")}:
            result = before
    teacher = load_dense(load_source(chosen.model))
    settings: dict[str, Any] = {"kind": "digits"}
    if chosen.data:
        settings = {"kind": "latents", "folder": chosen.data, "text_tokens": 1, "heldout": 128}
    for name, construction in CONSTRUCTIONS.items():
        entries = result["rows"].setdefault(name, [])
        for size in SIZES[len(entries) :]:
            data = open_data(DataConfig(**settings), 0)
            entries.append(measure(teacher, data, row(construction, size), 0, chosen.clips, chosen.heldout))
            path.write_text(json.dumps(result, indent=2) + "\n")
            print(name, entries[-1], file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
