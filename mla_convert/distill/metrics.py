"""Writes `metrics.jsonl`: one row per step, without wall-clock time, so that a resumed run ends with the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..files import explain_os_errors, write_text

Row = dict[str, Any]


class Metrics:
    """The rows of one stage, in the order of their steps."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[Row]:
        """All complete rows; a line that a killed run left incomplete is skipped."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`."""
        write_text(self.path, "".join(_line(row) for row in self.rows() if row["step"] <= step))

    def append(self, row: Row) -> None:
        with explain_os_errors(self.path), self.path.open("a", encoding="utf-8") as handle:
            handle.write(_line(row))


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
