"""Evaluates an existing checkpoint with the settings recorded in its manifest."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..devices import default_device
from ..distill.data import DataConfig, open_data
from ..distill.progress import Report
from ..distill.shard_index import read_index
from ..errors import UsageError
from ..evaluate.config import EvaluateConfig
from ..evaluate.fidelity import evaluate
from ..evaluate.report import REPORT_HTML, finite, write_report
from ..export.checkpoint import find_checkpoint, load_checkpoint
from ..export.manifest import recorded_recipe
from ..export.run_folder import evaluation_of, run_of
from ..families.causal import LatentTransformer
from ..files import MANIFEST, check_place
from ..load import Source, load_dense, load_source, read_config
from ..mla.kernel_settings import Mode
from ..mla.window import CausalConfig, causal_of
from ..recipe.schema import Recipe, validate
from ..run.config import GenerateConfig
from ..run.latents import DIGITS, prompt_encoder
from ..run.offload import together
from ..run.streaming import StreamingConfig
from .channels import check_teacher
from .clip_size import index_of, sized
from .context import CLIPS, DATA
from .rundir import read_state, require_clips
from .sources import source_of
from .summary import describe

logger = logging.getLogger(__name__)


def evaluate_checkpoint(
    folder: Path,
    teacher: str | None,
    out: Path | None,
    changes: Mapping[str, int],
    report: Report,
    kernels: Mode | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Compare the converted model in `folder` with its teacher; writes report.json and report.html.

    `teacher` replaces the manifest's source, `changes` override keys of its `evaluate` section, and `kernels`
    overrides `streaming.kernels`. The report goes to `out`, by default where `evaluation_of` says. Returns the path of
    the page and the report as it is stored, with None for numbers that are not finite. Raises UserError in one line.
    """
    root, inner = find_checkpoint(folder)
    config = read_config(inner)
    if not config.get("mla"):
        raise UsageError(
            f"{folder} is a dense model, and evaluate compares a converted one with its teacher; give a checkpoint "
            "that `mla-convert run` or `convert` wrote"
        )
    if out is None:
        out = evaluation_of(root)
    check_place(out / REPORT_HTML)
    recipe = _made_by(root)
    if recipe is None and prompt_encoder(config) != DIGITS:
        raise UsageError(f"{folder} has no {MANIFEST} that names its held-out data; evaluate a checkpoint of a run")
    source = _teacher_of(causal_of(config), teacher, recipe, folder)
    check_teacher(source, config, folder)
    started = time.monotonic()
    device = default_device()
    student = load_checkpoint(folder)
    assert isinstance(student, LatentTransformer)
    dtype = student.dtype if teacher is not None or recipe is None else getattr(torch, recipe.source.dtype)
    dense = load_dense(source, dtype)
    streaming = StreamingConfig() if recipe is None else recipe.streaming
    if kernels is not None:
        streaming = streaming.model_copy(update={"kernels": kernels})
    streaming.apply(student)
    streaming.dense.apply(dense)
    if recipe is not None:
        student.noise_range = dense.noise_range = recipe.source.noise_range
    run = run_of(root)
    beside = run or root.parent
    data = DataConfig(kind="digits") if recipe is None else recipe.data.made_in(beside / DATA)
    known = None if data.folder is None else read_index(beside / CLIPS, Path(data.folder))
    clips = open_data(data, 0 if recipe is None else recipe.seed, dense.needed_conditions, known)
    # Held-out clips of a larger folder are others, and some of them were trained on.
    if run is not None:
        require_clips(run, read_state(run)["steps"], clips.identity)
    settings = (EvaluateConfig() if recipe is None else recipe.evaluate).model_copy(update=dict(changes))
    with together([dense, student], device):
        found = evaluate(student, dense, clips, settings, report)
    generate = GenerateConfig() if recipe is None else recipe.generate
    generate = sized(generate, data, lambda: index_of(clips))
    measured = {
        "source": teacher or (recipe.source.model if recipe else None),
        **found,
        **describe(student, generate, streaming.cache),
        "recipe": recipe.dump() if recipe else None,
        "seconds": {"evaluate": round(time.monotonic() - started, 3)},
    }
    if measured["clips"] < settings.clips:
        logger.warning("measured on all %d held-out clips, fewer than %d", measured["clips"], settings.clips)
    result = finite(measured)
    return write_report(out, result), result


def _made_by(root: Path) -> Recipe | None:
    """The recipe in a checkpoint's manifest; None without one."""
    recorded = recorded_recipe(root)
    return validate(Recipe, recorded) if recorded else None


def _teacher_of(causal: CausalConfig, teacher: str | None, recipe: Recipe | None, folder: Path) -> Source:
    """Locate the dense model, with the student's chunk size and window."""
    if teacher is not None:
        return load_source(teacher, causal=causal.model_dump(mode="json"))
    if recipe is None:
        raise UsageError(f"{folder} has no {MANIFEST} that names its source; give it with --teacher")
    return source_of(recipe.source, causal)
