"""The paper's spectra and memory curves, of the embedded teachers and of Wan's shapes.

    python docs/benchmarks/study.py [NAME=RUN ...]

Measures the spectra of the weights, of the activations and of the operators that a conversion puts in
their place: at the start, from each of the three initializations, and after every stage of the finished
runs given by name. Computes the memory of Wan2.1-1.3B by streams and by window. Writes `study.json`,
the tables `study.md` and the figures `study-*.svg` beside itself; `--draw` makes tables and figures
again from `study.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import plots
import torch
from matplotlib.ticker import FuncFormatter, NullLocator

from mla_convert.charts import MUTED, RUNS, STUDENT, TEACHER, Chart
from mla_convert.convert import ConvertConfig, convert_model
from mla_convert.evaluate.geometry import preset
from mla_convert.evaluate.memory import plan
from mla_convert.evaluate.spectrum import gram_spectrum
from mla_convert.export.checkpoint import load_checkpoint
from mla_convert.export.manifest import versions
from mla_convert.families.wan import FAMILY
from mla_convert.load import load_dense, load_source
from mla_convert.pipeline.inspection import inspect_source

HERE = Path(__file__).parent
RANK = 28
RANKS = (1, 2, 4, 6, 8, 11, 14, 16, 20, 24, RANK, 34, 40, 56, 80, 112, 144, 192, 288, 384)
# The paper's 192 + 32, half of it, and the smallest rank that it tries.
LATENTS = {"224": (192, 32), "112": (96, 16), "96": (64, 32)}
STREAMS = (1, 2, 4, 8, 11, 16, 25, 32, 48, 64, 80, 96)
WINDOWS = (3, 9, 21, 42, 81, 162, 324)
SEEN = {
    "energy_at": "weights",
    "energy_at_activation": "keys and values",
    "energy_at_output": "as the output sees them",
}
COLOURS = {"weights": TEACHER, "keys and values": RUNS[2], "as the output sees them": STUDENT}


def spectra() -> dict[str, Any]:
    """Per teacher and layer: 99 % ranks and the energy kept at each rank; of weights alone without clips."""
    found = {}
    for name in ("digits", "natural"):
        ranks = [rank for rank in RANKS if name == "digits" or rank <= 192]
        result = inspect_source(f"zoo:{name}", None, None, None, None, ranks, None, lambda *told: None)
        keys = ("layer", "directions", "rank99_weight", "rank99_activation", "rank99_output", *SEEN)
        found[name] = [{key: row[key] for key in keys} for row in result["layers"]]
    return found


def operator(layer: Any) -> torch.Tensor:
    """What a converted layer restores of keys and values as a map of its input, `[H (N + V), C]`, float64.

    `kv_b_proj kv_a_proj [diag(g s) W_K; W_V]`, with the scalar of QK-norm at its mean for white inputs.
    """
    w_k, w_v = layer.to_k.weight.double(), layer.to_v.weight.double()
    norm = (w_k.square().sum(1) + layer.to_k.bias.double().square()).mean().rsqrt()
    stacked = torch.cat([layer.norm_k.weight.double().flatten().unsqueeze(1) * norm * w_k, w_v])
    return layer.kv_b_proj.weight.double() @ (layer.kv_a_proj.weight.double() @ stacked)


def rank_used(model: Any) -> list[dict[str, float]]:
    """By layer: the rank, the directions that hold 99 % of the operator's energy, and its effective rank."""
    rows = []
    for block in model.blocks:
        spectrum = gram_spectrum(operator(block.attn1).detach())
        rank = block.attn1.rank
        rows.append({"rank": rank, "rank99": spectrum.rank(), "effective_rank": spectrum.effective_rank()})
    return rows


def operators(runs: dict[str, Path]) -> dict[str, list[dict[str, float]]]:
    """Rank used by initialization, then by run and stage."""
    teacher = load_dense(load_source("zoo:digits"))
    found = {}
    for init in ("random", "svd"):
        config = ConvertConfig(position="rotate_on_read", own_chunk="exact", init=init, kv_lora_rank=RANK)
        found[f"{init}, before training"] = rank_used(convert_model(FAMILY, teacher, config, None, seed=0))
    for name, run in runs.items():
        for stage in sorted((run / "stages").iterdir()):
            if (stage / "transformer").is_dir():
                found[f"{name}, {stage.name.partition('-')[2]}"] = rank_used(load_checkpoint(stage))
    return found


def memory() -> dict[str, Any]:
    """Bytes of Wan2.1-1.3B in bfloat16: all of it by streams, one stream's cache by window."""
    geometry = preset("wan2.1-t2v-1.3b").geometry
    plans = {name: plan(geometry, *row, gpu="H100") for name, row in LATENTS.items()}
    any_plan = plans["224"]
    fixed = any_plan.weights_bytes + any_plan.reserved_bytes
    rows = {"dense": any_plan.dense_cache_bytes, **{name: p.latent_cache_bytes for name, p in plans.items()}}
    windows: dict[str, dict[str, Any]] = {}
    for frames in WINDOWS:
        there = {name: plan(geometry, *row, frames=frames, gpu="H100") for name, row in LATENTS.items()}
        windows[str(frames)] = {
            "seconds": there["224"].seconds_of_context,
            "dense": there["224"].dense_cache_bytes,
            **{name: p.latent_cache_bytes for name, p in there.items()},
            "streams_dense": there["224"].max_streams_dense,
            "streams_224": there["224"].max_streams_latent,
        }
    return {
        "by_streams": {
            name: [fixed + count * (cache + any_plan.activation_bytes) for count in STREAMS]
            for name, cache in rows.items()
        },
        "streams": list(STREAMS),
        "bytes_a_stream": {name: cache + any_plan.activation_bytes for name, cache in rows.items()},
        "cache_bytes": rows,
        "gpu_memory_bytes": any_plan.gpu_memory_bytes,
        "on_b200": {
            "dense": plan(geometry, 192, 32, gpu="B200").max_streams_dense,
            "224": plan(geometry, 192, 32, gpu="B200").max_streams_latent,
        },
        "by_window": windows,
    }


def operations() -> dict[str, dict[str, float]]:
    """Floating-point operations of one layer's attention at a full window, by queries; two a multiply-add."""
    geometry = preset("wan2.1-t2v-1.3b").geometry
    heads, head_dim, rank, shared = geometry.num_attention_heads, geometry.attention_head_dim, *LATENTS["224"]
    keys = geometry.cached_tokens(geometry.window_frames)
    found = {}
    for queries in (4680, 1560):
        pairs = 2 * heads * queries * keys
        found[str(queries)] = {
            "dense": pairs * 2 * head_dim,
            "expanding the latents, beside dense": 2 * heads * keys * rank * (2 * head_dim - shared),
            "absorbed, rank 192": pairs * (2 * rank + shared),
            "absorbed, rank 96": pairs * (2 * 96 + shared),
            "absorbed, rank 64": pairs * (2 * 64 + shared),
        }
    return found


def tables(found: dict[str, Any]) -> str:
    """Spectra, rank used, memory by window, what one plan says, operations."""
    lines = [
        "| teacher, layer | directions | 99 %: weights | keys and values | as the output sees them "
        f"| rank {RANK} keeps: weights | keys and values | as the output sees them |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, layers in found["spectra"].items():
        for row in layers:
            needs = [row[key] for key in ("rank99_weight", "rank99_activation", "rank99_output")]
            kept = [row[key] and row[key][str(RANK)] for key in SEEN]
            cells = [f"{name}, {row['layer']}", str(row["directions"]), *("" if n is None else str(n) for n in needs)]
            cells += ["" if share is None else f"{100 * share:.2f} %" for share in kept]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| operator | rank | 99 % of its energy in | share of the rank | effective rank, share |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for name, layers in found["operators"].items():
        rank, held, spread = (
            statistics.mean(row[key] for row in layers) for key in ("rank", "rank99", "effective_rank")
        )
        lines.append(f"| {name} | {rank:g} | {held:.1f} | {held / rank:.2f} | {spread / rank:.2f} |")
    lines += [
        "",
        "| window, latent frames | seconds | dense cache | 224 | 112 | 96 | dense streams in 80 GB | latent (224) |",
    ]
    lines += ["| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for frames, row in found["memory"]["by_window"].items():
        caches = (f"{row[name] / 1e9:.2f} GB" for name in ("dense", *LATENTS))
        streams = f"{row['streams_dense']} | {row['streams_224']}"
        lines.append(f"| {frames} | {row['seconds']:.1f} | {' | '.join(caches)} | {streams} |")
    card, large = (plan(preset("wan2.1-t2v-1.3b").geometry, *LATENTS["224"], gpu=gpu) for gpu in ("H100", "B200"))
    working = card.activation_bytes / 1e9
    lines += ["", "| | dense | latent |", "| --- | ---: | ---: |"]
    lines += [
        f"| cached scalars per token per layer | {card.dense_scalars_per_token:,} "
        f"| {card.latent_scalars_per_token:,} (-{100 * card.reduction:.1f} %) |",
        f"| cache of one stream, {card.frames} frames of {card.tokens_per_frame:,} tokens, bf16 "
        f"| {card.dense_cache_bytes / 1e9:.2f} GB | {card.latent_cache_bytes / 1e9:.2f} GB |",
        f"| streams in {card.gpu_memory_bytes / 1e9:.0f} GB | {card.max_streams_dense} | {card.max_streams_latent} |",
        f"| one stream more, with its working memory | {card.dense_cache_bytes / 1e9 + working:.2f} GB "
        f"| {card.latent_cache_bytes / 1e9 + working:.2f} GB |",
        f"| streams on a B200 of 180 GB | {large.max_streams_dense} | {large.max_streams_latent} |",
    ]
    queries = found["operations"]
    lines += [
        "",
        f"| GFLOP | {' | '.join(f'{int(number):,} queries' for number in queries)} |",
        "| --- | ---: | ---: |",
    ]
    for way in next(iter(queries.values())):
        lines.append(f"| {way} | {' | '.join(f'{row[way] / 1e9:.1f}' for row in queries.values())} |")
    frames = preset("wan2.1-t2v-1.3b").geometry.tokens_per_frame
    heads = (f"{int(n):,} queries ({int(n) // frames} frame{'s' if int(n) > frames else ''})" for n in queries)
    lines += ["", f"| | {' | '.join(heads)} |", "| --- | ---: | ---: |"]
    counts = (f"{row['dense'] / 1e9:.0f} GFLOP" for row in queries.values())
    lines.append(f"| dense attention | {' | '.join(counts)} |")
    for rank in (192, 64):
        # A hair more, so that halves are rounded up.
        times = (f"{row[f'absorbed, rank {rank}'] / row['dense'] + 1e-9:.2f}x" for row in queries.values())
        lines.append(f"| absorbed, `kv_lora_rank` {rank} + 32 | {' | '.join(times)} |")
    shares = (f"{100 * row['expanding the latents, beside dense'] / row['dense']:.1f} %" for row in queries.values())
    lines.append(f"| expanding, `kv_lora_rank` 192, beside dense attention | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any]) -> None:
    """The figures."""
    plots.save(_spectra(found["spectra"]["digits"]), HERE / "study-spectra.svg")
    plots.save(_rank99(found["spectra"]), HERE / "study-rank99.svg")
    plots.save(_memory(found["memory"]), HERE / "study-memory.svg")


def _spectra(layers: list[dict[str, Any]]) -> str:
    with Chart("study spectra", (9, 3.3), 3) as chart:
        for ax, (key, title) in zip(chart.panels, SEEN.items(), strict=True):
            for row in layers:
                points = [(int(rank), 100 * share) for rank, share in row[key].items()]
                ax.plot(
                    *zip(*points, strict=True), color=COLOURS[title], alpha=0.35 + 0.2 * row["layer"], linewidth=1.6
                )
            ax.axvline(RANK, color=MUTED, linewidth=1, dashes=(2, 3))
            ax.axhline(99, color=MUTED, linewidth=1, dashes=(2, 3))
            ax.set(xscale="log", ylim=(0, 103), title=title, xlabel="directions")
            ax.set_xticks([1, 4, RANK, 192], ["1", "4", str(RANK), "192"])
            ax.xaxis.set_minor_locator(NullLocator())
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    return chart.svg


def _rank99(teachers: dict[str, list[dict[str, Any]]]) -> str:
    with Chart("study rank99", (9, 3.0), 2) as chart:
        shares = [
            (f"{name}, {row['layer']}", 100 * row["rank99_weight"] / row["directions"])
            for name, layers in teachers.items()
            for row in layers
        ]
        left, right = chart.panels
        left.barh([name for name, _ in shares][::-1], [share for _, share in shares][::-1], color=TEACHER, height=0.6)
        left.set(xlim=(0, 100), title="weights: share of the directions for 99 %")
        left.grid(axis="y", visible=False)
        left.grid(axis="x", visible=True)
        left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        layers = teachers["digits"]
        for offset, key, name in (
            (-0.2, "rank99_activation", "keys and values"),
            (0.2, "rank99_output", "as the output sees them"),
        ):
            places = [row["layer"] + offset for row in layers]
            right.bar(places, [row[key] for row in layers], width=0.36, color=COLOURS[name], label=name)
        right.axhline(RANK, color=MUTED, linewidth=1, dashes=(2, 3))
        right.set(title="digits: directions for 99 %", xlabel="layer", ylim=(0, 40))
        right.set_xticks(range(len(layers)))
        right.legend(frameon=False, loc="upper left", ncols=2, fontsize=9.5)
    return chart.svg


def _memory(found: dict[str, Any]) -> str:
    with Chart("study memory", (9, 3.6), 2) as chart:
        left, right = chart.panels
        limit = found["gpu_memory_bytes"] / 1e9
        names = {"dense": "dense", **{name: f"latent, {name} scalars" for name in LATENTS}}
        colors = {"dense": TEACHER, "224": RUNS[0], "112": RUNS[1], "96": RUNS[2]}
        for name, points in found["by_streams"].items():
            left.plot(found["streams"], [value / 1e9 for value in points], color=colors[name], label=names[name])
        left.axhline(limit, color=MUTED, linewidth=1, dashes=(2, 3))
        left.set(
            ylim=(0, 1.5 * limit), xlim=(0, 96), xlabel="parallel streams", title="weights, caches, working memory"
        )
        windows = [(row["seconds"], row) for row in found["by_window"].values()]
        for name in names:
            right.plot(
                [s for s, _ in windows],
                [row[name] / 1e9 for _, row in windows],
                color=colors[name],
                label=names[name],
                marker="o",
                markersize=4,
            )
        right.set(xscale="log", yscale="log", xlabel="window, seconds", title="cache of one stream")
        right.set_xticks([1, 5, 20, 80], ["1", "5", "20", "80"])
        right.xaxis.set_minor_locator(NullLocator())
        right.yaxis.set_minor_locator(NullLocator())
        for ax in chart.panels:
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} GB"))
        right.legend(frameon=False, fontsize=9.5)
    return chart.svg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="NAME=RUN", help="finished runs on the digits teacher")
    parser.add_argument("--draw", action="store_true", help="only tables and figures, from study.json")
    arguments = parser.parse_args()
    path = HERE / "study.json"
    if arguments.draw:
        found = json.loads(path.read_text(encoding="utf-8"))
    else:
        runs = {name: Path(folder) for name, _, folder in (text.partition("=") for text in arguments.runs)}
        found = {"device": "cpu", "versions": versions(), "spectra": spectra(), "operators": operators(runs)}
    found |= {"memory": memory(), "operations": operations()}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (HERE / "study.md").write_text(tables(found), encoding="utf-8")
    draw(found)
    print(tables(found), end="")


if __name__ == "__main__":
    main()
