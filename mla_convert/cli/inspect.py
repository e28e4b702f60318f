"""`mla-convert inspect`: reports how well each layer of a dense model compresses, before anything is converted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from ..errors import UsageError, UserError, quoted
from .options import Json
from .output import print_result, stderr

_TOP_PAIRS = 4


def inspect(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A dense model: zoo:digits, a folder, a file or a Hub ID.")
    ],
    subfolder: Annotated[str | None, typer.Option(help="Folder of the transformer in SOURCE.")] = None,
    file: Annotated[str | None, typer.Option(help="Weights file in SOURCE, such as checkpoints/model.pt.")] = None,
    use_ema: Annotated[
        bool | None, typer.Option(help="Read a training checkpoint's EMA weights, or its raw ones.", show_default=False)
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="LoRA weights to merge, in SOURCE or a separate file; repeatable."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Parquet shards to calibrate on; digits models need none."),
    ] = None,
    clips: Annotated[
        int | None, typer.Option(min=0, help="Calibration clips; 64 by default, 0 for the weights alone.")
    ] = None,
    text_tokens: Annotated[
        int | None, typer.Option(min=1, help="Pad text embeddings of different lengths to this many tokens.")
    ] = None,
    latents: Annotated[
        Literal["auto", "normalized", "raw"],
        typer.Option(
            metavar="FORM",
            help="normalized or raw (FastVideo's), where the shards do not record it; auto looks there.",
        ),
    ] = "auto",
    ranks: Annotated[
        str | None,
        typer.Option(metavar="R,R,...", help="Cached scalars to report on; 64,128,192,224,256 for Wan2.1-1.3B."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for inspect.json and plots.")] = None,
    as_json: Json = False,
) -> None:
    """Report spectra, 99 % ranks, rotary pairs and predicted error by rank; changes nothing."""
    chosen = None if ranks is None else parse_ranks(ranks)
    with stderr().status("loading PyTorch"):
        from ..distill.progress import progress_bars
        from ..load import AdapterConfig
        from ..pipeline.inspection import inspect_source

    named = [(one, _is_own(one, source)) for one in adapter or []]
    adapters = [AdapterConfig(model=one) if own else AdapterConfig(file=one) for one, own in named]
    with progress_bars(stderr()) as report:
        result = inspect_source(
            source, subfolder, data, clips, text_tokens, chosen, out, report, file, use_ema, adapters, latents
        )
    tables = [rank_table(result), energy_table(result)]
    if result["predicted"] is not None:
        tables.append(prediction_table(result))
    print_result(as_json, result, *tables, result["recommendation"], *([] if out is None else [f"plots: {out}"]))


def _is_own(adapter: str, source: str) -> bool:
    """Whether an adapter is a file or folder of its own; otherwise it is a file in `source`. Raises UserError."""
    if Path(adapter).expanduser().exists():
        return True
    root = Path(source).expanduser()
    # A file's adapters are beside it.
    root = root.parent if root.is_file() else root
    if source.startswith("zoo:") or (root.exists() and not (root / adapter).is_file()):
        raise UserError(f"--adapter {quoted(adapter)} does not exist, neither by itself nor in {source}")
    return False


def parse_ranks(text: str) -> list[int]:
    """Parse ranks such as `64,128`. Raises UsageError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UsageError(f"--ranks: {quoted(text)} is not a list of ranks; write them such as 64,128,192,256")
    return [int(part) for part in parts]


def rank_table(result: Mapping[str, Any]) -> Table:
    """Tabulate 99 % ranks and the rotary pairs that matter most, by layer."""
    table = Table(title=f"{result['model']}: directions for 99 % of the energy", title_justify="left")
    columns = [("layer", "layer"), ("weights", "rank99_weight")]
    if result["predicted"] is not None:
        columns += [("keys, values", "rank99_activation"), ("output", "rank99_output")]
    for heading, _ in columns:
        table.add_column(heading, justify="right")
    if result["predicted"] is not None:
        table.add_column("rotary pairs that matter")
    for row in result["layers"]:
        pairs = row["rope_pairs"]
        table.add_row(*(f"{row[key]:,}" for _, key in columns), *([] if pairs is None else [_pairs(pairs)]))
    table.caption = f"[W_K; W_V] has {result['layers'][0]['directions']:,} directions"
    table.caption_justify = "left"
    return table


def energy_table(result: Mapping[str, Any]) -> Table:
    """Tabulate the energy kept at each rank, by layer."""
    has_clips = result["predicted"] is not None
    what = "of the weights / of what the output sees" if has_clips else "of the weights"
    table = Table(title=f"energy kept {what}, in %", title_justify="left")
    table.add_column("layer", justify="right")
    for rank in result["ranks"]:
        table.add_column(f"rank {rank:,}", justify="right", no_wrap=True)
    for row in result["layers"]:
        kept = [row["energy_at"], *([row["energy_at_output"]] if has_clips else [])]
        cells = (" / ".join(_share(energy[str(rank)]) for energy in kept) for rank in result["ranks"])
        table.add_row(str(row["layer"]), *cells)
    return table


def prediction_table(result: Mapping[str, Any]) -> Table:
    """Tabulate the predicted velocity error of every layout by cached scalars."""
    from ..evaluate.text import rough_percent

    table = Table(title="predicted velocity error before training, by cached scalars", title_justify="left")
    # The longest word, so that only "2 layers a latent" goes to a second line.
    table.add_column("position", min_width=len("rotate_on_read,"), max_width=len("rotate_on_read, 2"))
    for rank in result["ranks"]:
        table.add_column(f"{rank:,}", justify="right", no_wrap=True)
    for layout, errors in result["predicted"].items():
        table.add_row(layout, *("-" if error is None else rough_percent(error) for error in errors.values()))
    data, trial = result["data"], result["measured"]
    table.caption = (
        f"own chunk exact, the same rank in every layer; {data['clips']} clips, {data['tokens']:,} tokens\n"
        f"scaled by a trial: {trial['scalars']:,} scalars, {trial['position']}, "
        f"{rough_percent(trial['velocity_rel_error'])} measured on other clips"
    )
    table.caption_justify = "left"
    return table


def _share(energy: float) -> str:
    """A share in per cent, without the decimals of 100."""
    return "100" if energy > 0.9995 else f"{100 * energy:.1f}"


def _pairs(pairs: list[dict[str, Any]]) -> str:
    return ", ".join(f"{row['axis']}{row['pair']} {100 * row['share']:.0f} %" for row in pairs[:_TOP_PAIRS])
