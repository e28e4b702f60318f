"""Every figure in the documentation is in a committed result: tables row by row, percentages one by one."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "benchmarks"
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if RESULTS not in path.parents)]
NUMBER = r"(?<![\w.,])[+-]?\d[\d,]*(?:\.\d+)?"
FIGURE = re.compile(NUMBER + r" (?:%|[kMGT]B\b)")
SCIENTIFIC = re.compile(r"(?<![\w.])\d(?:\.\d+)?e-\d+\b")
# Figures that no measurement gave, with where they come from.
STATED = {
    # 192 + 32 of 2 x 12 x 128 scalars, and as many of the embedded teacher's.
    **dict.fromkeys(("92.7 %", "-92.7 %", "7.3 %"), "the cache of VideoMLA, arXiv 2605.30351"),
    "45.8 %": "arXiv 2605.30351: what rank 192 keeps of the weights in the median layer",
    **dict.fromkeys(("99 %", "95 %", "100 %"), "a level that a definition asks for"),
    **dict.fromkeys(("6.26 GB", "0.78 GB"), "arXiv 2605.30351: memory of one stream more on a B200"),
    "6 GB": "6.04 GB, rounded",
    "1 GB": "an assumption of plan",
    **dict.fromkeys(("0.7 %", "2.5 %", "6 %", "12 %"), "aims, not results"),
    **dict.fromkeys(("96 %", "98 %", "97.9 %"), "1 - 14 / 384 and 1 - 8 / 384"),
    "17 MB": "4 bytes x (16 x 21 x 60 x 104 + 512 x 4,096)",
    "30 %": "the bound of tests/test_dry_run.py",
    **dict.fromkeys(
        ("12.9 GB", "155 GB", "412 GB"), "64 x 2 x 32,760 tokens of 1,536 bfloat16 numbers, and 12 or 32 layers of them"
    ),
    "2 %": "the error that the recommendation of inspect looks for",
}


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


@pytest.fixture(scope="module")
def committed() -> str:
    """All committed result tables."""
    return "\n".join(path.read_text(encoding="utf-8") for path in RESULTS.glob("*.md") if path.name != "README.md")


def is_of_results(page: str, header: str) -> bool:
    """Whether a table has a column of numbers, which are aligned right."""
    rule = page.partition(header + "\n")[2].partition("\n")[0]
    return re.search(r"-:\s*\|", rule) is not None


def without_output(page: Path) -> str:
    """The text of a page without indented lines, which are commands and what they print."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("    "))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_rows_are_those_of_a_result(page: Path, results: dict[str, set[str]]) -> None:
    """A table with a column of numbers is a table of a result file, or its numbers are in tests."""
    text = page.read_text(encoding="utf-8")
    for header, rows in tables(text).items():
        if header in results:
            assert [row for row in rows if row not in results[header]] == []
        elif is_of_results(text, header):
            unknown = [row for row in rows if not SCIENTIFIC.search(row)]
            assert unknown == [], f"no script in docs/benchmarks wrote a table {header}"


# The reference of recipe keys is the schema's text; another test holds it.
@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name != "recipes.md"], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_figures_stand_in_a_result(page: Path, committed: str) -> None:
    """Percentages and bytes in running text are in a result file, with or without their sign."""
    known = {figure.lstrip("+-") for figure in FIGURE.findall(committed)} | {name.lstrip("-") for name in STATED}
    found = FIGURE.findall(re.sub(r"`[^`]*`", "", without_output(page)))
    unknown = [figure for figure in found if figure.lstrip("+-") not in known]
    assert unknown == [], "write what a command of docs/benchmarks measured, or say in STATED where it is from"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_observed_errors_stand_in_a_test(page: Path) -> None:
    """An error such as 1.8e-7 is noted in a test beside its tolerance."""
    folders = (ROOT / "tests", ROOT / "kernels" / "mla-attention", ROOT / "mla_convert", RESULTS)
    sources = [path for folder in folders for path in folder.rglob("*.py")]
    sources += [path for path in RESULTS.iterdir() if path.suffix in (".json", ".md") and path.name != "README.md"]
    known = {float(number) for path in sources for number in SCIENTIFIC.findall(path.read_text(encoding="utf-8"))}
    unknown = [number for number in SCIENTIFIC.findall(without_output(page)) if float(number) not in known]
    assert unknown == []


def test_stated_shares() -> None:
    share = 224 / 3072
    assert f"{100 * share:.1f} %" == "7.3 %" and f"{100 * share - 100:.1f} %" == "-92.7 %"


def test_the_demos_table_is_its_reports() -> None:
    namespace: dict[str, object] = {"__name__": "demo", "__file__": str(RESULTS / "demo.py")}
    exec(compile((RESULTS / "demo.py").read_text(encoding="utf-8"), "demo.py", "exec"), namespace)
    found = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    assert namespace["table"](found) == (RESULTS / "demo.md").read_text(encoding="utf-8")  # type: ignore[operator]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert (RESULTS / "demo.md").read_text(encoding="utf-8").strip() in readme
    assert f"in {found['seconds']['total'] / 60:.0f} minutes on two CPU cores" in readme


def test_the_tables_of_the_stages_are_their_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RESULTS))
    stages = importlib.import_module("stages")
    found = json.loads((RESULTS / "stages.json").read_text(encoding="utf-8"))
    assert stages.table(found) == (RESULTS / "stages.md").read_text(encoding="utf-8")
    assert stages.steps_table(found) == (RESULTS / "stages-steps.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["cache_bits", "cache_bits-natural"])
def test_the_table_of_cache_bits_is_its_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RESULTS))
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    table = importlib.import_module("cache_bits").table(found)
    assert table == (RESULTS / f"{name}.md").read_text(encoding="utf-8")


def test_the_study_says_of_the_stages_what_their_table_says() -> None:
    """Two initializations of a layer's own latent: how far apart they are, and how much of their rank they use."""
    (rows,) = tables((RESULTS / "stages-steps.md").read_text(encoding="utf-8")).values()
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in rows}
    svd, random = cells["`decoupled`, `svd`"], cells["`decoupled`, `random`"]

    def apart(column: int) -> str:
        high, low = (float(row[column].split()[0]) for row in (random, svd))
        return f"{high / low:.1f}"

    told = f"from {apart(1)} times apart in held-out loss to {apart(2)}, and use all of their rank before"
    study = (RESULTS.parent / "study.md").read_text(encoding="utf-8")
    assert (svd[4], random[4]) == ("1.00", "1.00")
    assert f"{told} and {svd[5]} and {random[5]} of it after" in study
