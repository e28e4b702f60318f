"""Builds the VBench section of the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .text import DASH
from .vbench_suite import DIMENSIONS

TOTALS = {"quality": "Quality score", "semantic": "Semantic score", "total": "Total score"}


def vbench_table(result: Mapping[str, Any]) -> dict[str, Any]:
    """The table of scores: column `heads`, `rows` of `name`, `cells` and `total`, and a `note` on the setup."""
    published: Mapping[str, Mapping[str, float]] = result.get("published") or {}
    scores = {name: entry["score"] for name, entry in result["scores"].items()} | dict(result.get("totals") or {})
    names = {name: name.replace("_", " ").capitalize() for name in DIMENSIONS} | TOTALS
    rows = []
    for key, name in names.items():
        values = [scores.get(key), *(row.get(key) for row in published.values())]
        if scores.get(key) is not None:
            cells = [DASH if value is None else f"{value:.4f}" for value in values]
            rows.append({"name": name, "cells": cells, "total": key in TOTALS})
    videos = sum(entry["videos"] for entry in result["scores"].values())
    note = (
        f"{result['suite']} {result['version']} on videos of {result['seconds']} s, {result['samples']} per standard "
        f"prompt; {videos:,} videos scored, summed over all dimensions."
    )
    if result.get("told") == "longer":
        note += " The model was given rewritten, longer prompts."
    if published:
        note += " The other columns are published values supplied by the user, not measured here."
    return {"heads": ["student", *published], "rows": rows, "note": note}
