"""`mla-convert compare`: shows finished runs side by side on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Json
from .output import print_result, stderr


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Two or more run folders or `evaluate` outputs.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .html file to write.")] = Path("compare.html"),
    as_json: Json = False,
) -> None:
    """Compare finished runs side by side: metrics, curves, videos."""
    with stderr().status("reading the runs"):
        from ..pipeline.comparison import compare_runs

        compared = compare_runs(runs, out)
    names = {run.name: run.folder for run in compared}
    print_result(as_json, {"report": str(out), "runs": names}, f"{', '.join(names)}: {out}")
