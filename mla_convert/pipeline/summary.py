"""Builds the report of a run from its evaluations, its computed memory and its timings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..distill.metrics import Metrics, Row
from ..evaluate.geometry import from_model
from ..evaluate.memory import plan
from ..evaluate.report import REPORT_JSON
from ..export.checkpoint import load_shape
from ..export.manifest import versions
from ..mla.bits import CacheBits
from ..run.config import GenerateConfig
from ..run.latents import latent_scale, latent_size
from .context import CHECKPOINT, KERNELS, ROLLOUTS, SAMPLES, Context

SHARED_WITH_PLAN = (
    "dense_scalars_per_token",
    "latent_scalars_per_token",
    "reduction",
    "dense_cache_bytes",
    "latent_cache_bytes",
)


def describe(model: Any, generate: GenerateConfig, cache: CacheBits = "auto") -> dict[str, Any]:
    """Computed memory of a converted model, with its latents stored as `cache` says, and of its dense form.

    Also returns the installed `versions`.
    """
    height, width = latent_size(model.config, generate)
    geometry, rows = from_model(model, height, width, generate.fps, latent_scale(model.config).temporal)
    dtype = str(model.dtype).removeprefix("torch.")
    memory = plan(geometry, rows, dtype=dtype, cache=cache).model_dump(mode="json")
    return {
        "versions": versions(),
        **{key: memory[key] for key in SHARED_WITH_PLAN},
        "plan": memory,
    }


def read_evaluation(folder: Path) -> dict[str, Any]:
    """Read the evaluation of the model in `folder`."""
    result: dict[str, Any] = json.loads((folder / REPORT_JSON).read_text(encoding="utf-8"))
    return result


def training_rows(context: Context) -> list[Row]:
    """The training metrics of all stages, in order."""
    stages = range(1, len(context.recipe.distill) + 1)
    return [row for index in stages for row in Metrics(context.training_folder(index) / "metrics.jsonl").rows()]


def _sampled_by(context: Context) -> dict[str, Any]:
    """Under `kernels`, what computed attention in the samples of a run; empty without samples."""
    if not context.recipe.generate.prompts:
        return {}
    with safe_open(context.path / SAMPLES / ROLLOUTS, "pt") as file:
        return {KERNELS: json.loads((file.metadata() or {}).get(KERNELS, "{}"))}


def build_report(context: Context) -> dict[str, Any]:
    """Build `report.json` of a run, with the keys described in `mla_convert.evaluate.report`."""
    seconds, converted = dict(context.seconds), read_evaluation(context.stage_folder(0))["student_loss"]
    return {
        "name": context.recipe.name,
        "source": context.source.origin,
        "recipe": context.recipe.dump(),
        **read_evaluation(context.stage_folder(-1)),
        **describe(load_shape(context.path / CHECKPOINT), context.generate, context.recipe.streaming.cache),
        **_sampled_by(context),
        # NaN, so that the report lists it among the numbers that are not finite.
        "converted_loss": math.nan if converted is None else converted,
        "seconds": {**seconds, "total": round(sum(seconds.values()), 3)},
        "curves": training_rows(context),
    }
