"""Writes the model card of a checkpoint: what was converted, what was measured, how to load it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml
from huggingface_hub import ModelCardData

from ..load.hub import is_hub_id
from ..sizes import format_bytes
from .citations import BASE_MODELS, VIDEO_MLA
from .components import IMAGE_PARTS, Components, sampling_of
from .evidence import SAMPLES, Evidence
from .pictures import ANIMATION, Picture
from .standalone import library_versions

TEMPLATE = Path(__file__).with_name("card.md.j2")
TAGS = ["causal-video-diffusion", "mla-convert"]
MLA_TAGS = ["multi-head-latent-attention", "mla", "kv-cache"]
MAX_PROMPT = 100
NEEDED = ("vae", "text_encoder", "tokenizer")
MINUS = "\N{MINUS SIGN}"
# A bracket would end the text of a Markdown link.
_BRACKETS = str.maketrans("[]", "()")


class Origin(NamedTuple):
    """The source as the card names it; `hub_id` and `revision` are set only for a source on the Hub."""

    name: str | None
    hub_id: str | None = None
    revision: str | None = None


def render_card(
    manifest: Mapping[str, Any],
    evidence: Evidence,
    pictures: Sequence[Picture] = (),
    components: Components | None = None,
    needed: Sequence[str] = (),
) -> str:
    """The card as Markdown with YAML front matter.

    `needed` names the image conditions that the model requires. Of a local source path, only the last
    component appears. A license appears only if the source names one.
    """
    model, source = manifest["model"], manifest.get("source") or {}
    origin, recipe, report = find_origin(source), manifest.get("recipe") or {}, evidence.report or {}
    samples = find_samples(evidence, recipe)
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-to-video" if needed else "text-to-video",
        base_model=origin.hub_id,
        base_model_relation="finetune" if origin.hub_id else None,
        license=source.get("license"),
        tags=[*(MLA_TAGS if model.get("mla") else []), *TAGS, model["family"]],
        widget=[{"text": text, "output": {"url": file}} for file, text in samples] or None,
    )
    digits = source.get("model") == "zoo:digits" or sampling_of(recipe).get("prompt_format") == "digits"
    reads_tokens = "encoder_hidden_states_image" in needed
    parts = [*NEEDED, *(IMAGE_PARTS if reads_tokens else ())]
    noise_range = list((recipe.get("source") or {}).get("noise_range", [0.0, 1.0]))
    base = BASE_MODELS.get(model["family"])
    animation = next((picture for picture in pictures if picture.file == ANIMATION), None)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(TEMPLATE.name).render(
        card_data=data.to_yaml(),
        model=model,
        mla=model.get("mla"),
        origin=origin,
        adapters=[(adapter["file"], adapter["scale"]) for adapter in source.get("adapters") or []],
        license=source.get("license"),
        code=next((file for file in manifest["files"] if file.endswith(".py")), None),
        libraries=library_versions(),
        components=components or Components({}),
        noise_range=noise_range,
        # A single expert generates no video by itself; `zoo:natural` reads no prompts and has no VAE.
        generates=noise_range == [0.0, 1.0] and (digits or not (origin.name or "").startswith("zoo:")),
        prompt=_prompt(recipe, digits) + (', image="first.png"' if needed else ""),
        needed=needed,
        reads_tokens=reads_tokens,
        missing=[] if digits else [f"`{part}`" for part in parts if part not in (components or Components({})).classes],
        layers=_layers(model, report),
        recipe=_recipe_text(recipe),
        stages=[stage["stage"] for stage in recipe.get("distill") or []],
        data_kind=(recipe.get("data") or {}).get("kind"),
        fidelity=_fidelity(report),
        memory=_memory(report),
        bench=evidence.bench,
        samples=samples,
        animation=animation,
        pictures=[picture for picture in pictures if picture is not animation],
        evidence=manifest.get("evidence") or {},
        versions=manifest["versions"],
        git_revision=manifest.get("git_revision"),
        method=VIDEO_MLA if model.get("mla") else None,
        base=base,
    )


def find_origin(source: Mapping[str, Any]) -> Origin:
    """How the card names a manifest's `source`."""
    name, revision = source.get("model"), source.get("revision")
    if not name or name.startswith("zoo:"):
        return Origin(name)
    # Only what came from the Hub has a revision.
    if revision and is_hub_id(name):
        return Origin(name, name, revision)
    return Origin(Path(name).name)


def find_samples(evidence: Evidence, recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """File and prompt of each sample, the prompt on one line and shortened; runs number the files by prompt."""
    prompts = (recipe.get("generate") or {}).get("prompts") or []
    found = []
    for file in evidence.samples:
        number = file.stem.partition("-")[0]
        known = number.isdecimal() and int(number) < len(prompts)
        text = " ".join((prompts[int(number)] if known else file.stem).translate(_BRACKETS).split())
        found.append((f"{SAMPLES}/{file.name}", textwrap.shorten(text, MAX_PROMPT, placeholder=" …")))
    return found


def _prompt(recipe: Mapping[str, Any], digits: bool) -> str:
    """A sample prompt as a Python literal: the recipe's first one, on one line and shortened."""
    known = (recipe.get("generate") or {}).get("prompts") or []
    prompt = known[0] if known else "7 at 2,1 moving up-left" if digits else "a cat walks through tall grass"
    text = textwrap.shorten(" ".join(prompt.replace("`", "'").split()), MAX_PROMPT, placeholder=" …")
    return json.dumps(text, ensure_ascii=False)


def _layers(model: Mapping[str, Any], report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rank, shared key, cached scalars and measured error of each layer of a converted model."""
    mla = model.get("mla")
    if not mla:
        return []
    errors = report.get("attention_rel_error") or []
    together = mla.get("layers_per_latent", 1)
    return [
        {
            "rank": rank,
            "shared": 2 * len(mla["rope_pairs"][index]),
            "cached": model["layer_scalars_per_token"][index]
            if index % together == 0
            else f"with {index - index % together}",
            "error": _percent(errors[index]) if index < len(errors) and errors[index] is not None else "",
        }
        for index, rank in enumerate(mla["kv_lora_rank"])
    ]


def _recipe_text(recipe: Mapping[str, Any]) -> str | None:
    """The recipe sections that determine the weights, as YAML; the source's path is left out."""
    shown = {key: recipe[key] for key in ("convert", "distill") if recipe.get(key)}
    return yaml.safe_dump(shown, sort_keys=False).strip() if shown else None


def _fidelity(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rows of the table of measured values; keys that the report lacks are left out."""
    rows = []
    teacher, converted, student = (report.get(f"{name}_loss") for name in ("teacher", "converted", "student"))
    if teacher is not None:
        rows.append(("held-out flow-matching loss, dense model", f"{teacher:.4f}"))
    if converted is not None:
        rows.append(("held-out loss, converted, before training", f"{converted:.4f}{_rise(converted, teacher)}"))
    if student is not None:
        rows.append(("held-out loss, this model", f"{student:.4f}{_rise(student, teacher)}"))
    if report.get("velocity_rel_error") is not None:
        rows.append(("velocity error relative to the dense model", _percent(report["velocity_rel_error"])))
    layers = [error for error in report.get("attention_rel_error") or [] if error is not None]
    if layers:
        text = f"{_percent(sum(layers) / len(layers))}, {_percent(max(layers))}"
        rows.append(("attention output error, mean over layers and worst layer", text))
    accuracy = report.get("accuracy") or {}
    for length, share in (accuracy.get("student") or {}).items():
        dense = (accuracy.get("teacher") or {}).get(length)
        dense_share = "" if dense is None else f" (dense {_percent(dense)})"
        rows.append((f"prompted digit recognized at {length} the training length", f"{_percent(share)}{dense_share}"))
    return rows


def _memory(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of name, dense and latent: cache of a stream and streams per GPU, where the report has them."""
    rows = []
    if report.get("dense_cache_bytes") and report.get("latent_cache_bytes"):
        values = (format_bytes(report[f"{kind}_cache_bytes"]) for kind in ("dense", "latent"))
        rows.append(("cache of one stream, full window", *values))
    plan = report.get("plan")
    if plan:
        streams = (f"{plan[f'max_streams_{kind}']:,}" for kind in ("dense", "latent"))
        rows.append((f"parallel streams on one {plan['gpu']} (computed)", *streams))
    return [(name, dense, latent) for name, dense, latent in rows]


def _rise(loss: float, teacher: float | None) -> str:
    if not teacher:
        return ""
    percents = 100 * (loss - teacher) / teacher
    # Two significant digits below 1 %, as in the report.
    size = f"{abs(percents):#.2g}" if 0 < abs(percents) < 1 else f"{abs(percents):.1f}"
    return f" ({MINUS if percents < 0 else '+'}{size} %)"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
