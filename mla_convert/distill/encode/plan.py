"""What an encoding is made of, fixed before it begins, so that a killed one can go on."""

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
    """The settings, and the number and digest of what is encoded (`items`, such as names with captions)."""
    digest = hashlib.sha256(json.dumps(list(map(list, items))).encode()).hexdigest()
    return {"format": FORMAT, "kind": kind, **settings, "items": len(items), "sha256": digest}


@contextlib.contextmanager
def claimed(out: Path, plan: dict[str, Any], resume: bool) -> Iterator[None]:
    """Hold `out` for an encoding by `plan`: a new or empty folder, or with `resume` one of the same plan.

    Raises UserError for a folder that is something else's, that another process works in, or that
    would have to be resumed; UsageError that names what differs from the plan in it.
    """
    claim_folder(out, "folder of encoded data", (PLAN,))
    if (out / PLAN).exists():
        _require_same(out, plan)
        if not resume:
            raise UserError(f"{out} was encoded or begun before; go on with --resume or give another --out")
    with locked_folder(out):
        for leftover in (*out.glob(".*.tmp"), *out.glob(f"{WORK}/.*.tmp")):
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
            raise UsageError(f"the videos or captions are not those that {out} was begun with; give another --out")
        raise UsageError(f"{out} was begun with {key} {recorded.get(key)}, not {plan.get(key)}; give another --out")
