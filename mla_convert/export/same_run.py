"""Knows which keys of a recipe decide the weights of a run, and so whether two checkpoints come from the same run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..distill.trainer import BOOKKEEPING

LATE = ("evaluate", "generate", "streaming", "export")
"""Sections that training does not depend on. Each has a command of its own."""


def decisive(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a dumped recipe that decides the weights; a run that is resumed may change the rest."""
    part = {section: value for section, value in recipe.items() if section not in LATE}
    # Skipping a damaged clip keeps the order of the others.
    part["data"] = {key: value for key, value in (recipe.get("data") or {}).items() if key != "skip"}
    part["distill"] = [
        {key: value for key, value in stage.items() if key not in BOOKKEEPING} for stage in recipe.get("distill") or ()
    ]
    return part


def of_same_run(manifest: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the manifests of two checkpoints record the same source, layout and recipe as far as it is decisive."""
    return _decided_by(manifest) == _decided_by(other)


def _decided_by(manifest: Mapping[str, Any]) -> list[Any]:
    model = manifest.get("model") or {}
    layout = [model.get(key) for key in ("class", "causal", "mla")]
    return [manifest.get("source"), layout, decisive(manifest.get("recipe") or {})]
