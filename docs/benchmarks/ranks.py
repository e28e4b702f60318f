"""Loss before training against cached scalars, by layout: `python docs/benchmarks/ranks.py`.

`--model zoo:natural --data FOLDER` takes the other teacher. One calibration seed and eight sizes a
construction; the shared key of the layouts that cache one takes between a seventh and a quarter of the row.
All fits come from one pass over the calibration clips, with the clips, noise and held-out set of
`layouts.py`. Writes `ranks-NAME.json`, the table `ranks-NAME.md` and the plot `ranks-NAME.svg` beside
itself; `--draw` makes table and plot again from the first.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import plots
import torch
from layouts import data_of
from matplotlib.ticker import FuncFormatter, NullLocator

from mla_convert.charts import MUTED, RUNS, Chart
from mla_convert.convert import ConvertConfig, clip_batches
from mla_convert.convert.blocks import ModelBlocks
from mla_convert.convert.calibrate import Visitor, sweep
from mla_convert.convert.clips import enter_clips
from mla_convert.convert.initialize import LayerInit, LayerReading, initialize_layers, read_layer
from mla_convert.convert.state import merge_state, mla_config
from mla_convert.convert.store import TensorStore
from mla_convert.convert.surgery import copy_unsaved_buffers, empty_model
from mla_convert.distill.data import Data
from mla_convert.distill.objective import NoisedClips, noised_clips, predict_velocity
from mla_convert.draws import Use, drawn
from mla_convert.families.wan import FAMILY
from mla_convert.load import load_dense, load_source

BATCH = 16
SIZES = (8, 14, 20, 28, 40, 56, 96, 192)
CONSTRUCTIONS: dict[str, dict[str, Any]] = {
    "decoupled, latent, svd (the paper's)": {"position": "decoupled", "own_chunk": "latent", "init": "svd"},
    "decoupled, exact, activation": {"position": "decoupled", "own_chunk": "exact", "init": "activation"},
    "derived, exact, activation": {"position": "derived", "own_chunk": "exact", "init": "activation"},
    "rotate_on_read, exact, activation": {"position": "rotate_on_read", "own_chunk": "exact", "init": "activation"},
    **{
        f"the same, one latent for {layers} layers": {
            "position": "rotate_on_read",
            "own_chunk": "exact",
            "init": "activation",
            "layers_per_latent": layers,
        }
        for layers in (2, 4)
    },
}
COLOURS = (RUNS[1], RUNS[2], RUNS[5], RUNS[0], RUNS[3], RUNS[4])
DENSE = 384


def row(construction: dict[str, Any], scalars: int) -> dict[str, Any]:
    """A conversion that caches so many scalars a token."""
    if construction["position"] == "rotate_on_read":
        return {**construction, "kv_lora_rank": scalars * construction.get("layers_per_latent", 1)}
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
        for (name, entries), color in zip(found.items(), COLOURS, strict=False):
            points = [(e["scalars"], 100 * e["loss_increase"]) for e in entries if e["loss_increase"] > 0]
            axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=4, label=name)
        axes.axvline(28, color=MUTED, linewidth=1, dashes=(2, 3))
        axes.set(
            xscale="log", yscale="log", xlabel="cached scalars a token a layer (dense: 384; dashed: VideoMLA's share)"
        )
        axes.set_ylim(bottom=0.03)
        axes.set_ylabel("held-out loss above the teacher's")
        axes.set_xticks(SIZES, [str(size) for size in SIZES])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.yaxis.set_minor_locator(NullLocator())
        above = axes.secondary_xaxis("top")
        above.set_xticks(SIZES, [f"{100 * size / DENSE:.3g} %" for size in SIZES])
        above.xaxis.set_minor_locator(NullLocator())
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
        arguments = {name: value for name, value in vars(chosen).items() if name != "draw"}
        rows = measure_all(chosen)
        result = {"device": "cpu", "torch": torch.__version__, "arguments": arguments, "rows": rows}
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    found = json.loads(path.read_text(encoding="utf-8"))["rows"]
    (folder / f"{stem}.md").write_text(table(found), encoding="utf-8")
    plots.save(plot(found), folder / f"{stem}.svg")
    print(table(found), end="")


class Heldout(NamedTuple):
    """Noised clips with the velocities of the teacher, as `fidelity` draws them."""

    batches: list[tuple[NoisedClips, torch.Tensor]]
    loss: float
    energy: float

    @classmethod
    def of(cls, teacher: Any, data: Data, count: int) -> Heldout:
        clips, generator = data.heldout(count), torch.Generator().manual_seed(0)
        batches, loss, energy = [], 0.0, 0.0
        pieces = (clips[key].split(BATCH) for key in ("latents", "encoder_hidden_states"))
        for latents, text in zip(*pieces, strict=True):
            inputs = noised_clips(latents, text, teacher.causal, generator, noise_range=teacher.noise_range)
            velocity = predict_velocity(teacher, inputs)
            loss += float((velocity - inputs.target).double().square().sum())
            energy += float(velocity.double().square().sum())
            batches.append((inputs, velocity))
        return cls(batches, loss, energy)

    def compare(self, student: Any) -> dict[str, float]:
        """`loss_increase` and `velocity_rel_error` of a converted model."""
        loss = error = 0.0
        for inputs, expected in self.batches:
            velocity = predict_velocity(student, inputs)
            loss += float((velocity - inputs.target).double().square().sum())
            error += float((velocity - expected).double().square().sum())
        return {"loss_increase": loss / self.loss - 1, "velocity_rel_error": (error / self.energy) ** 0.5}


def fits(teacher: Any, data: Data, clips: int) -> Iterator[tuple[str, ConvertConfig, list[LayerInit]]]:
    """Every construction at every size, fitted layer by layer from one sweep over `clips` clips."""
    configs = {(name, size): ConvertConfig(**row(c, size)) for name, c in CONSTRUCTIONS.items() for size in SIZES[::-1]}
    blocks, names = ModelBlocks(teacher), [*CONSTRUCTIONS]
    axes = blocks.model.rotary_table().axes
    plans: dict[tuple[str, int], dict[int, LayerInit]] = {key: {} for key in configs}
    readings: dict[tuple[str, int], dict[int, LayerReading]] = {key: {} for key in configs}

    class Fitting(Visitor):
        def visit(self, layer: int, block: Any, sample: Any) -> None:
            for (name, size), config in configs.items():
                largest, nested = plans[name, max(SIZES)], not config.cached_key and size < max(SIZES)
                if not nested:
                    seen, generator = sample if config.init == "activation" else None, drawn(Use.INIT, 0, layer)
                    readings[name, size][layer] = read_layer(block.attn1, seen, axes, config, generator)
                # What layers share is fitted when all of them were seen; they come from the last to the first.
                if layer % config.layers_per_latent:
                    continue
                rank, layers = config.ranks(len(blocks))[layer], range(layer, layer + config.layers_per_latent)
                if nested:
                    fitted = [largest[other].truncated(rank) for other in layers]
                else:
                    fitted = initialize_layers([readings[name, size].pop(other) for other in layers], config, rank)
                plans[name, size] |= dict(zip(layers, fitted, strict=True))

    calibration = next(config for config in configs.values() if config.init == "activation").calibration
    batches = clip_batches(data.example, range(clips), calibration.batch_size)
    entered = enter_clips(blocks, batches, calibration, TensorStore(None))
    most = max(config.layers_per_latent for config in configs.values())
    sweep(
        blocks,
        entered,
        calibration,
        history_only=True,
        wanted=range(len(blocks)),
        visitor=Fitting(),
        layers_per_latent=most,
    )
    for (name, size), config in sorted(configs.items(), key=lambda item: (names.index(item[0][0]), item[0][1])):
        yield name, config, [plans[name, size][layer] for layer in range(len(blocks))]


def build(teacher: Any, config: ConvertConfig, plans: list[LayerInit]) -> Any:
    """The converted model of the fits."""
    mla = mla_config(config, config.ranks(len(plans)), plans, teacher.config.attention_head_dim)
    model = empty_model(FAMILY, teacher, mla)
    model.load_state_dict(merge_state(teacher.state_dict(), plans, model.state_dict()), assign=True)
    copy_unsaved_buffers(teacher, model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def measure_all(chosen: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Scalars, ranks and errors of every construction at every size."""
    teacher = load_dense(load_source(chosen.model))
    data = data_of(chosen.data)
    heldout = Heldout.of(teacher, data, chosen.heldout)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, config, plans in fits(teacher, data, chosen.clips):
        student = build(teacher, config, plans)
        entry = {"scalars": student.mla.scalars_per_token(), "ranks": list(student.mla.kv_lora_rank)}
        found.setdefault(name, []).append(entry | heldout.compare(student))
        print(name, found[name][-1], file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    main()
