"""A figure in the documentation is one that a committed result holds: tables row by row, percentages one by one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "benchmarks"
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if RESULTS not in path.parents)]
PERCENT = re.compile(r"[+-]\d[\d,]*(?:\.\d+)? %")
# Shares of the published shapes, computed from them: 224 and 32 scalars of 2 x 12 x 128.
COMPUTED = {"-92.7 %": 1 - 224 / 3072}


def tables(text: str) -> dict[str, list[str]]:
    """Rows of the Markdown tables in a text, by their header."""
    found: dict[str, list[str]] = {}
    header = None
    for line in text.splitlines():
        row = line.strip()
        if not row.startswith("|"):
            header = None
        elif header is None:
            header = row
        elif not set(row) <= set("|-: "):
            found.setdefault(header, []).append(row)
    return found


@pytest.fixture(scope="module")
def results() -> dict[str, set[str]]:
    """Rows of all committed result tables, by header."""
    found: dict[str, set[str]] = {}
    for path in RESULTS.glob("*.md"):
        for header, rows in tables(path.read_text(encoding="utf-8")).items():
            found.setdefault(header, set()).update(rows)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_rows_are_those_of_a_result(page: Path, results: dict[str, set[str]]) -> None:
    for header, rows in tables(page.read_text(encoding="utf-8")).items():
        if header in results:
            assert [row for row in rows if row not in results[header]] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_percentages_stand_in_a_result(page: Path) -> None:
    committed = "\n".join(path.read_text(encoding="utf-8") for path in RESULTS.glob("*.md"))
    known = set(PERCENT.findall(committed)) | set(COMPUTED)
    # Indented lines are what a command prints.
    prose = "\n".join(line for line in page.read_text(encoding="utf-8").splitlines() if not line.startswith("    "))
    unknown = [figure for figure in PERCENT.findall(prose) if figure not in known]
    assert unknown == []


def test_computed_shares() -> None:
    assert all(f"{-100 * value:.1f} %" == figure for figure, value in COMPUTED.items())


def test_the_demos_table_is_its_reports() -> None:
    namespace: dict[str, object] = {"__name__": "demo", "__file__": str(RESULTS / "demo.py")}
    exec(compile((RESULTS / "demo.py").read_text(encoding="utf-8"), "demo.py", "exec"), namespace)
    found = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    assert namespace["table"](found) == (RESULTS / "demo.md").read_text(encoding="utf-8")  # type: ignore[operator]
    assert (RESULTS / "demo.md").read_text(encoding="utf-8").strip() in (ROOT / "README.md").read_text(encoding="utf-8")
