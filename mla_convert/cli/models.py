"""`export` and `evaluate`, and the parsers of sizes, cache bits and sampling options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import UsageError
from .output import Json, Kernels, print_result, stderr

if TYPE_CHECKING:
    from ..mla.bits import CacheBits

Model = Annotated[Path, typer.Argument(metavar="DIR", help="A run folder, a checkpoint or a transformer folder.")]


def export(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the checkpoint.")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Data type; by default that of DIR.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weights file, such as 5GB.")] = "5GB",
    standalone: Annotated[
        bool, typer.Option("--standalone", help="Include the model's class, for use without mla-convert.")
    ] = False,
    components: Annotated[
        Literal["reference", "copy", "none"],
        typer.Option(help="What to do with the source's scheduler, tokenizer, text encoder and VAE."),
    ] = "reference",
    as_json: Json = False,
) -> None:
    """Write a diffusers checkpoint for release, with its evidence and a model card."""
    with stderr().status("loading PyTorch"):
        from ..export.config import ExportConfig
        from ..export.release import export as export_checkpoint
        from ..recipe.schema import validate

    form = "standalone" if standalone else "installed"
    settings = {"dtype": dtype, "max_shard_size": max_shard_size, "form": form, "components": components}
    result = export_checkpoint(model, out, validate(ExportConfig, settings))
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
        typer.Option("--out", "-o", help="Folder for report.json and report.html; by default evaluation/ in DIR."),
    ] = None,
    clips: Annotated[int | None, typer.Option(min=1, help="Held-out clips.")] = None,
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
    changes = {"clips": clips, "rollout_prompts": rollout_prompts, "long_factor": long_factor}
    with stderr().status("loading PyTorch"):
        from ..distill.progress import progress_bars
        from ..pipeline.evaluation import evaluate_checkpoint
    from .summary import evaluation_table

    with progress_bars(stderr()) as report:
        page, result = evaluate_checkpoint(
            model, teacher, out, {key: value for key, value in changes.items() if value is not None}, report, kernels
        )
    print_result(as_json, {**result, "report": str(page)}, lambda: evaluation_table(result), f"report: {page}")


def parse_size(text: str) -> tuple[int, int]:
    """Parse a size such as `60x104` into height and width. Raises UsageError."""
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise UsageError(f"{text!r} is not a size; write HEIGHTxWIDTH, such as 60x104")
    return int(height), int(width)


def parse_steps(text: str) -> list[int]:
    """Parse noise levels such as `1000,750,500,250`. Raises UsageError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(
            f"{text!r} is not a list of denoising steps; write decreasing whole numbers such as 1000,750,500,250"
        )
    return [int(part) for part in parts]


def parse_cache(text: str) -> CacheBits:
    """Parse `--cache` into a value of `streaming.cache`. Raises UsageError."""
    from ..mla.bits import parse_bits

    try:
        return parse_bits(text)
    except ValueError as error:
        raise UsageError(f"--cache: {error}") from None


def sampling(denoising_steps: str | None, first_chunk_steps: str | None = None, **options: Any) -> dict[str, Any]:
    """Turn sampling options into keys of a GenerateConfig; options that are None are left out. Raises UsageError."""
    levels = {"denoising_steps": denoising_steps, "first_chunk_steps": first_chunk_steps}
    options |= {key: None if text is None else parse_steps(text) for key, text in levels.items()}
    chosen = {key: value for key, value in options.items() if value is not None}
    if "num_inference_steps" in chosen and denoising_steps is None:
        # --steps replaces the recipe's denoising_steps.
        chosen = {**dict.fromkeys(levels), **chosen}
    return chosen
