"""`mla-convert export` and `mla-convert evaluate`: release a converted model, and measure it against its teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .options import DType, Json, Kernels, Model
from .output import print_result, stderr


def export(
    model: Model,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="A folder for the checkpoint; an earlier export of the same run is replaced."
        ),
    ],
    dtype: DType = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weights file, such as 5GB.")] = "5GB",
    standalone: Annotated[
        bool, typer.Option("--standalone", help="Include the model's class, for use without mla-convert.")
    ] = False,
    components: Annotated[
        Literal["reference", "copy", "none"],
        typer.Option(help="What to do with the source's scheduler, tokenizer, text encoder and VAE."),
    ] = "reference",
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint of another run in OUT.")] = False,
    as_json: Json = False,
) -> None:
    """Write a diffusers checkpoint for release, with its evidence and a model card."""
    with stderr().status("loading PyTorch"):
        from ..export.config import ExportConfig
        from ..export.release import export as export_checkpoint
        from ..recipe.schema import validate

    form = "standalone" if standalone else "installed"
    settings = {"dtype": dtype, "max_shard_size": max_shard_size, "form": form, "components": components}
    result = export_checkpoint(model, out, validate(ExportConfig, settings), replace=force)
    print_result(
        as_json,
        result,
        f"{result['class']} in {result['dtype']}, {result['form']}, {result['bytes']:,} bytes: {result['path']}",
    )


def evaluate(
    model: Model,
    teacher: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="The dense model; by default the one DIR was converted from.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder for report.json and report.html; by default evaluation/ in the run folder, or evaluation/NAME "
            "for its stage NAME, and DIR itself outside a run.",
        ),
    ] = None,
    clips: Annotated[int | None, typer.Option(min=1, help="Held-out clips.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Clips measured at once; another number draws other noise.")
    ] = None,
    rollout_prompts: Annotated[
        int | None, typer.Option(min=0, help="Number of prompts to generate, for digits.")
    ] = None,
    long_factor: Annotated[
        int | None, typer.Option(min=0, help="Length of long rollouts, as a multiple of a clip; 0 for none.")
    ] = None,
    kernels: Kernels = None,
    as_json: Json = False,
) -> None:
    """Measure a converted model against its teacher."""
    changes = {"clips": clips, "batch_size": batch_size, "rollout_prompts": rollout_prompts, "long_factor": long_factor}
    with stderr().status("loading PyTorch"):
        from ..distill.progress import progress_bars
        from ..pipeline.evaluation import evaluate_checkpoint
    from .summary import evaluation_table

    with progress_bars(stderr()) as report:
        page, result = evaluate_checkpoint(
            model, teacher, out, {key: value for key, value in changes.items() if value is not None}, report, kernels
        )
    print_result(
        as_json, {**_without_pictures(result), "report": str(page)}, lambda: evaluation_table(result), f"report: {page}"
    )


def _without_pictures(value: Any) -> Any:
    """A result without the pictures of its clips, which are most of its bytes; report.json has them."""
    if isinstance(value, dict):
        return {key: _without_pictures(entry) for key, entry in value.items() if key != "pictures"}
    return [_without_pictures(entry) for entry in value] if isinstance(value, list) else value
