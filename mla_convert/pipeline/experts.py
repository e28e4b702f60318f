"""Runs and loads experts, models that split the noise levels between them (Wan2.2): one run each, in one folder."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..distill.requests import stopping_at_once
from ..errors import UsageError
from ..export.checkpoint import find_checkpoint, load_checkpoint
from ..export.manifest import recorded_section
from ..families.causal import CausalTransformer
from ..files import claim_folder, write_text
from ..flow import ALL_NOISE
from ..load import known_config
from ..recipe.reader import read_yaml
from ..recipe.schema import Recipe
from .checks import check_inputs
from .context import Context
from .run import RunResult, run, steps_until, this_process
from .rundir import RESOLVED, STATE, RunDir


def run_experts(
    recipe: Recipe,
    path: Path,
    resume: bool = False,
    until: str | None = None,
    console: Console | None = None,
    only: str | None = None,
) -> dict[str, RunResult]:
    """Run every expert of `recipe`, or only the one named `only`, each in `path / NAME`.

    The other arguments are those of `run`. All experts are checked before the first one starts. Returns their
    results by name. Raises UserError in one line.
    """
    names = list(recipe.experts or ()) if only is None else [only]
    parts = {name: recipe.expert(name) for name in names}
    if this_process().is_main_process:
        with stopping_at_once(main=True):
            _prepare(recipe, path, parts, resume, until)
    return {name: run(part, path / name, resume, until, console) for name, part in parts.items()}


def _prepare(recipe: Recipe, path: Path, parts: Mapping[str, Recipe], resume: bool, until: str | None) -> None:
    """Check all `parts`, then record the recipe in `path`."""
    claim_folder(path, "run folder of several experts", (RESOLVED,))
    if (path / STATE).exists():
        raise UsageError(f"{path} is the run folder of one model; give another --out")
    created = not path.exists()
    try:
        for name, part in parts.items():
            folder = RunDir(path / name, part, resume)
            try:
                pending = [step for step in steps_until(part, until) if not folder.is_done(step.name)]
                if pending:
                    context = Context(part, path / name, lambda *args: None)
                    check_inputs(context, pending, folder.finished)
            finally:
                folder.close()
    except BaseException:
        if created:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
    write_text(path / RESOLVED, recipe.dump())


def load_models(
    folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> list[CausalTransformer]:
    """Load the model of a run, checkpoint or transformer folder, or all experts of a run folder, in eval mode.

    `dtype` None keeps the stored dtypes. Raises UserError in one line; also for the folder of a single expert,
    which cannot roll out a video alone.
    """
    experts = _experts_of(folder)
    models = []
    for name, noise_range in experts.items():
        model = load_checkpoint(folder / name, dtype, device)
        model.noise_range = noise_range
        models.append(model)
    if models:
        return models
    _refuse_one_of_several(folder)
    return [load_checkpoint(folder, dtype, device)]


def read_model_config(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Checkpoint folder and configuration of the model that `load_models` would load; the first of several experts.

    Raises UserError in one line.
    """
    names = list(_experts_of(folder))
    if not names:
        _refuse_one_of_several(folder)
    root, inner = find_checkpoint(folder / names[0] if names else folder)
    return root, known_config(inner)


def _experts_of(folder: Path) -> dict[str, tuple[float, float]]:
    """Noise ranges of a run folder's experts by name; empty for any other folder."""
    if not (folder / RESOLVED).is_file():
        return {}
    recipe = read_yaml((folder / RESOLVED).read_text(encoding="utf-8"))
    experts = recipe.get("experts") if isinstance(recipe, dict) else None
    return {name: (low, high) for name, (low, high) in (experts or {}).items()}


def _refuse_one_of_several(folder: Path) -> None:
    """Raise UsageError for the folder of a single expert."""
    low, high = recorded_section(find_checkpoint(folder)[0], "source").get("noise_range", ALL_NOISE)
    if (low, high) != ALL_NOISE:
        raise UsageError(
            f"{folder} is one of several experts, for noise levels {low:g} to {high:g}; give the run folder of all "
            "experts"
        )
