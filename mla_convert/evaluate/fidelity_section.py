"""Builds the parts of the report on attention maps and on the worst clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..charts import MUTED, STUDENT, Chart, layer_axis, percent_axis
from .text import digits_text, percent, signed

ARROW = "\N{RIGHTWARDS ARROW}"
HEADS = 5
"""Number of heads in the table."""


def map_chart(layers: Sequence[Mapping[str, Any]]) -> str:
    """Plot the total variation of every head as a dot and the mean of each layer as a line, as SVG."""
    with Chart("attention maps") as chart:
        ax = chart.axes
        heads = [[100 * value for value in _known(layer["total_variation"])] for layer in layers]
        for number, values in enumerate(heads):
            ax.plot([number] * len(values), values, color=MUTED, marker="o", markersize=4, linestyle="", alpha=0.6)
        ax.plot(
            range(len(heads)), [float(np.mean(values)) if values else float("nan") for values in heads], color=STUDENT
        )
        ax.set_xlim(-0.5, len(heads) - 0.5)
        layer_axis(ax, "layer (dots: heads, line: mean over heads)")
        percent_axis(ax)
    return chart.svg


def worst_heads(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The heads with the largest total variation: `name`, `variation`, `kl`, `logit` and `history`."""
    found = [
        (value, number, head)
        for number, layer in enumerate(layers)
        for head, value in enumerate(layer["total_variation"])
        if value is not None
    ]
    rows = []
    for value, number, head in sorted(found, key=lambda entry: (-entry[0], entry[1:]))[:HEADS]:
        layer = layers[number]
        shares = [layer["history_share"][name][head] for name in ("teacher", "student")]
        rows.append(
            {
                "name": f"layer {number}, head {head}",
                "variation": percent(value),
                "kl": digits_text(layer["kl_divergence"][head], 2),
                "logit": digits_text(layer["logit_error"][head], 2),
                "history": f" {ARROW} ".join(percent(share) for share in shares),
            }
        )
    return rows


def worst_clips(by_clip: Mapping[str, Any]) -> dict[str, Any]:
    """A `note` on all clips, and the worst `clips`: `name`, `error`, `increase`, `pictures` (may be None)."""
    clips = [
        {
            "name": clip["prompt"] or f"clip {clip['clip']}",
            "error": percent(clip["velocity_rel_error"]),
            "increase": signed(clip["loss_increase"]),
            "pictures": clip.get("pictures"),
        }
        for clip in by_clip["worst"]
        if clip["velocity_rel_error"] is not None and clip["loss_increase"] is not None
    ]
    note = ""
    if by_clip.get("median") is not None and by_clip.get("p95") is not None:
        note = (
            f"Velocity error over {by_clip['clips']} held-out clips: median {percent(by_clip['median'])}, "
            f"95th percentile {percent(by_clip['p95'])}."
        )
    return {"note": note, "clips": clips}


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]
