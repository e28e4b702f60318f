"""The model card of a checkpoint: what was converted, what was measured, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

TEMPLATE = Path(__file__).with_name("card.md.j2")
TAGS = ["causal-video-diffusion", "mla-convert"]
MLA_TAGS = ["multi-head-latent-attention", "mla", "kv-cache"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def write_card(path: Path, manifest: Mapping[str, Any], report: Mapping[str, Any] | None) -> None:
    """Write the card of the checkpoint that `manifest` describes; `report` is its report.json, if there is one."""
    path.write_text(render_card(manifest, report), encoding="utf-8")


def render_card(manifest: Mapping[str, Any], report: Mapping[str, Any] | None) -> str:
    """The card as Markdown with YAML front matter. A local path of the source appears by its last name only."""
    model, source = manifest["model"], manifest.get("source") or {}
    origin, hub_id = source.get("model"), None
    # Only what came from the Hub has a revision.
    if origin and source.get("revision") and _HUB_ID.fullmatch(origin):
        hub_id = origin
    elif origin and not origin.startswith("zoo:"):
        origin = Path(origin).name
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-video",
        base_model=hub_id,
        base_model_relation="finetune" if hub_id else None,
        license=source.get("license"),
        tags=[*(MLA_TAGS if model.get("mla") else []), *TAGS, model["family"]],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model=model,
        mla=model.get("mla"),
        origin=origin,
        hub_id=hub_id,
        revision=source.get("revision"),
        recipe=_recipe_text(manifest.get("recipe")),
        fidelity=_fidelity(report),
        versions=manifest["versions"],
        git_revision=manifest.get("git_revision"),
    )
    return str(card)


def _recipe_text(recipe: Mapping[str, Any] | None) -> str | None:
    """The sections that decide what the weights are; the source's path stays out."""
    if not recipe:
        return None
    shown = {key: recipe[key] for key in ("convert", "distill") if recipe.get(key)}
    return yaml.safe_dump(shown, sort_keys=False).strip() or None


def _fidelity(report: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Rows of the table of measured values; keys that the report lacks are left out."""
    if not report:
        return []
    rows = []
    teacher, student = report.get("teacher_loss"), report.get("student_loss")
    if teacher is not None:
        rows.append(("held-out flow-matching loss of the dense model", f"{teacher:.4f}"))
    if student is not None:
        rows.append(("held-out flow-matching loss of this model", f"{student:.4f}"))
    if teacher and student is not None:
        rows.append(("rise of the loss", f"{(student - teacher) / teacher:+.1%}"))
    if report.get("velocity_rel_error") is not None:
        rows.append(("relative error of the velocity", f"{report['velocity_rel_error']:.4f}"))
    layers = report.get("attention_rel_error")
    if layers:
        rows.append(("relative error of the attention output, mean over layers", f"{sum(layers) / len(layers):.4f}"))
        rows.append(("relative error of the attention output, worst layer", f"{max(layers):.4f}"))
    return rows
