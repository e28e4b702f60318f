"""Records the settings and inputs of an encoding before it begins, so that a killed one can resume."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import UsageError, UserError
from ...files import claim_folder, locked_folder, write_json

PLAN, WORK = "encode.json", ".encode"
FORMAT = 1
_ITEMS = ("items", "sha256")


def make_plan(kind: str, settings: dict[str, Any], items: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The plan: the settings, and the number and digest of the inputs `items`, such as names with captions."""
    digest = hashlib.sha256(json.dumps(list(map(list, items))).encode()).hexdigest()
    return {"format": FORMAT, "kind": kind, **settings, "items": len(items), "sha256": digest}


@contextlib.contextmanager
def claimed(out: Path, plan: dict[str, Any], resume: bool) -> Iterator[None]:
    """Lock `out` for an encoding by `plan`: a new or empty folder, or with `resume` one that has the same plan.

    Raises UserError for a folder that has other content, that another process uses, or that
    needs `resume`; UsageError, with the difference, for a folder with another plan.
    """
    claim_folder(out, "folder of encoded data", (PLAN,))
    if (out / PLAN).exists():
        _require_same(out, plan)
        if not resume:
            raise UserError(f"{out} already holds an encoding; continue it with --resume or give another --out")
    with locked_folder(out):
        for leftover in (*out.glob(".*.tmp"), *out.glob(f"{WORK}/.*.tmp"), *out.glob(f"{WORK}/share-*")):
            leftover.unlink()
        write_json(out / PLAN, plan)
        yield
        shutil.rmtree(out / WORK, ignore_errors=True)


def _require_same(out: Path, plan: dict[str, Any]) -> None:
    try:
        recorded = json.loads((out / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{out / PLAN} cannot be read; encode again into another folder") from None
    for key in (*plan, *recorded):
        if recorded.get(key) == plan.get(key):
            continue
        if key in _ITEMS:
            raise UsageError(f"the videos or captions differ from those that {out} began with; give another --out")
        raise UsageError(f"{out} began with {key} {recorded.get(key)}, not {plan.get(key)}; give another --out")
