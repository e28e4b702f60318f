"""`convert`, `distill` and `run`: a recipe up to its first step, its last stage, or its report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..recipe.shipped import find_recipe
from .output import Json, Overrides, RecipeName, RunFolder, print_result, stderr

if TYPE_CHECKING:
    from ..pipeline import RunResult

Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in the run folder.")]


def convert(
    recipe: RecipeName,
    out: RunFolder = None,
    overrides: Overrides = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Calibrate and initialise the converted model."""
    _print_model(start(recipe, out, overrides, resume, until="convert"), "converted", as_json)


def distill(
    recipe: RecipeName,
    out: RunFolder = None,
    overrides: Overrides = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Convert where that is not done yet, then train the stages.

    Runs under `accelerate launch` and `torch.distributed.run` too.
    """
    _print_model(start(recipe, out, overrides, resume, until="distill"), "distilled", as_json)


def run(
    recipe: RecipeName,
    out: RunFolder = None,
    overrides: Overrides = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Convert, distill, evaluate, export and report; a killed run continues with --resume."""
    from .summary import result_of, run_table

    result = start(recipe, out, overrides, resume)
    if result.main:
        print_result(as_json, result_of(result.path), run_table(result.path))


def _print_model(result: RunResult, what: str, as_json: bool) -> None:
    if result.main:
        value = {"run": str(result.path), "model": str(result.model), "seconds": result.seconds}
        print_result(as_json, value, f"{what} model: {result.model}")


def start(
    recipe: str, out: Path | None, overrides: list[str] | None, resume: bool, until: str | None = None
) -> RunResult:
    """Read the recipe, then run it up to `until`."""
    from ..recipe.load import load_recipe

    loaded = load_recipe(find_recipe(recipe), overrides or ())
    with stderr().status("loading PyTorch"):
        from ..pipeline import run as run_pipeline

    return run_pipeline(loaded, out or Path("runs") / loaded.name, resume, until, stderr())
