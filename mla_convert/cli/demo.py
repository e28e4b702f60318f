"""`mla-convert demo`: runs the whole pipeline on the embedded teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..files import RUN_STATE
from .build import start
from .options import Json, Overrides
from .output import print_result


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; continues an interrupted demo in it.")] = Path(
        "runs/demo"
    ),
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Convert, distill, evaluate and sample the embedded digits model, in minutes on two CPU cores."""
    from .summary import result_of, run_table

    result = start("demo", out, overrides, resume=(out / RUN_STATE).exists())
    print_result(as_json, result_of(result.path), lambda: run_table(result.path))
