"""`convert`, `distill` and `run`: run a recipe up to its conversion, its last training stage, or its report."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from ..files import RESOLVED_RECIPE
from ..recipe.shipped import find_recipe
from .dry_run import print_needs
from .options import Expert, Json, Kernels, Overrides, RunFolder, RunRecipe
from .output import print_result, stderr

if TYPE_CHECKING:
    from ..pipeline import RunResult
    from ..recipe.schema import Recipe

Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in the run folder.")]


def convert(
    recipe: RunRecipe = None,
    out: RunFolder = None,
    overrides: Overrides = None,
    resume: Resume = False,
    expert: Expert = None,
    as_json: Json = False,
) -> None:
    """Calibrate and initialize the converted model."""
    _print_model(start(recipe, out, overrides, resume, "convert", expert), "converted", as_json)


def distill(
    recipe: RunRecipe = None,
    out: RunFolder = None,
    overrides: Overrides = None,
    resume: Resume = False,
    expert: Expert = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print parameters, memory per GPU, steps and tokens; train nothing.")
    ] = False,
    launch: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --dry-run: the Accelerate configuration to plan for.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="With --dry-run: plan for this many processes, with DDP.")] = 1,
    measure: Annotated[
        int, typer.Option(min=0, help="With --dry-run: time this many steps of each stage on this machine.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Convert the model if needed, then train the stages.

    Also runs under `accelerate launch` and `torch.distributed.run`.
    """
    if dry_run:
        loaded, _ = _read(recipe, out, overrides, resume)
        print_needs(loaded if expert is None else loaded.expert(expert), launch, processes, measure, as_json)
        return
    if launch is not None or processes > 1 or measure:
        raise UsageError("--launch, --processes and --measure only work with --dry-run; add it, or leave them out")
    _print_model(start(recipe, out, overrides, resume, "distill", expert), "distilled", as_json)


def run(
    recipe: RunRecipe = None,
    out: RunFolder = None,
    overrides: Overrides = None,
    resume: Resume = False,
    expert: Expert = None,
    kernels: Kernels = None,
    as_json: Json = False,
) -> None:
    """Convert, distill, evaluate, export and report; a killed run continues with --resume.

    A recipe with several experts runs them one after the other.
    """
    from .summary import result_of, run_table

    if kernels is not None:
        overrides = [*(overrides or ()), f"streaming.kernels={kernels}"]
    loaded, out = _read(recipe, out, overrides, resume)
    if loaded.experts is None or expert is not None:
        result = _run(loaded, out, resume, None, expert)
        if result.main:
            print_result(as_json, result_of(result.path), lambda: run_table(result.path))
        return
    with stderr().status("loading PyTorch"):
        from ..pipeline.experts import run_experts
    results = run_experts(loaded, out, resume, console=stderr())
    if all(result.main for result in results.values()):
        figures = {name: result_of(result.path) for name, result in results.items()}
        tables = [functools.partial(run_table, result.path) for result in results.values()]
        print_result(as_json, {"name": loaded.name, "run": str(out), "experts": figures}, *tables)


def _print_model(result: RunResult, what: str, as_json: bool) -> None:
    if result.main:
        value = {"run": str(result.path), "model": str(result.model), "seconds": result.seconds}
        print_result(as_json, value, f"{what} model: {result.model}")


def start(
    recipe: str | None,
    out: Path | None,
    overrides: list[str] | None,
    resume: bool,
    until: str | None = None,
    expert: str | None = None,
) -> RunResult:
    """Read the recipe, then run it, or only its expert `expert`, up to the step `until`."""
    loaded, out = _read(recipe, out, overrides, resume)
    return _run(loaded, out, resume, until, expert)


def _read(recipe: str | None, out: Path | None, overrides: list[str] | None, resume: bool) -> tuple[Recipe, Path]:
    """Load the recipe, or without one what the run in `out` has recorded; returns it with the run folder.

    That is `runs/NAME` by default.
    """
    from ..recipe.load import load_recipe

    path = _recorded(out, resume) if recipe is None else find_recipe(recipe)
    with stderr().status("loading PyTorch"):
        loaded = load_recipe(path, overrides or ())
    return loaded, out or Path("runs") / loaded.name


def _recorded(out: Path | None, resume: bool) -> Path:
    """The recipe of the run in `out`, `--set` included. Raises UsageError if no run is to be continued there."""
    if out is None or not resume:
        raise UsageError("give a RECIPE; only --resume with the --out of a run takes the one that is recorded there")
    path = out / RESOLVED_RECIPE
    if not path.is_file():
        raise UsageError(f"{out} has no {RESOLVED_RECIPE} of a run to continue; give a RECIPE")
    return path


def _run(recipe: Recipe, out: Path, resume: bool, until: str | None, expert: str | None) -> RunResult:
    with stderr().status("loading PyTorch"):
        from ..pipeline import run as run_pipeline
        from ..pipeline.experts import run_experts

    if expert is None:
        return run_pipeline(recipe, out, resume, until, stderr())
    return run_experts(recipe, out, resume, until, stderr(), only=expert)[expert]
