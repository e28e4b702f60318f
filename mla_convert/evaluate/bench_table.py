"""Tabulates the result of `bench` for a terminal of 80 columns."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table

from ..mla.kernels import describe
from .bench import DENSE, FIRST, LATENT, LATER, ROTATED, STREAMED, WRITE
from .text import factor, layout_parts

_VARIANTS = {DENSE: "dense", ROTATED: "dense, keys rotated", LATENT: "latent"}
_PASSES = {FIRST: "first pass", LATER: "later pass", WRITE: "pass that writes", STREAMED: "streamed"}


def verdict(result: dict[str, Any]) -> str:
    """One line on the cost of latent attention relative to dense attention while streaming."""
    time, memory = 1 / result[f"ratio_{STREAMED}"], result["ratio_cache"]
    speed = f"{time:.2f}x the time of dense attention" if time >= 1 else f"{1 / time:.2f}x as fast as dense attention"
    times, word = factor(memory, "less", "more")
    return f"latent: {speed}, {times:.1f}x {word} cache"


def bench_table(result: dict[str, Any]) -> Table:
    """The result as a table, one column per variant; times are milliseconds."""
    table = Table(
        title=f"{result['model']}: one layer, {result['queries']:,} queries, {result['keys']:,} keys in the window, "
        f"{result['dtype']}, {result['device']}",
        caption="\n".join(_notes(result)),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("ms")
    for heading in _VARIANTS.values():
        table.add_column(heading, justify="right")
    passes = [part for part in _PASSES if part != LATER or any(result["history_kept"].values())]
    times = [result[part][name]["median_ms"] for part in passes for name in _VARIANTS]
    # As many decimals everywhere as the shortest time needs for three digits.
    decimals = max(0, 2 - math.floor(math.log10(max(min(times), 1e-6))))

    def ms(value: float) -> str:
        return f"{value:,.{decimals}f}"

    for part in passes:
        table.add_row(_PASSES[part], *(ms(result[part][name]["median_ms"]) for name in _VARIANTS))
    streamed = [result[STREAMED][name] for name in _VARIANTS]
    if result["repeats"] > 1:
        table.add_row("  range", *(f"{ms(found['min_ms'])} to {ms(found['max_ms'])}" for found in streamed))
    latent = result[STREAMED][LATENT]["median_ms"]
    table.add_row("  over latent", *(f"{found['median_ms'] / latent:.2f}x" for found in streamed))
    sizes = result["cache_bytes_per_layer"]
    table.add_row("cache per layer", *(f"{sizes[name] / 1e6:,.2f} MB" for name in _VARIANTS))
    return table


def _notes(result: dict[str, Any]) -> list[str]:
    repeats, later = result["repeats"], result["num_inference_steps"] - 1
    medians = f"medians of {repeats} interleaved rounds" if repeats > 1 else "one round"
    return [
        verdict(result),
        f"latent is {', '.join(layout_parts({**result, 'kv_lora_rank': None}))}; dense rotates its keys on read",
        f"{medians}; streamed: mean over one first pass, {later} later {'one' if later == 1 else 'ones'} and one that "
        f"writes; {describe(result['kernels'])}",
        *([result["note"]] if result.get("note") else []),
    ]
