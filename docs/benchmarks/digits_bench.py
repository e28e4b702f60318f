"""Digits-Bench of a finished run: `mla-convert run recipes/bench/digits.yaml --out RUN`, then

    python docs/benchmarks/digits_bench.py RUN

Reads `RUN/report.json` (a run's, or one that `evaluate --out RUN` wrote) and writes `digits-bench.json`,
the tables `digits-bench.md` and the figure `digits-bench.svg` beside itself; without RUN the tables and
the figure are made again from `digits-bench.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import plots

from mla_convert.evaluate.digits_section import recognition_by_frame, tables

HERE = Path(__file__).parent
KEYS = ("digits_bench", "teacher_loss", "student_loss", "loss_increase", "reduction", "layout", "seconds", "versions")


def text(found: dict[str, Any]) -> str:
    """A table a length: real videos, teacher and student, with 95 % intervals."""
    bench, lines = found["digits_bench"], []
    size = f"{bench['prompts']} prompts" + (f" x {bench['seeds']} seeds" if bench["seeds"] > 1 else "")
    for table in tables(bench):
        title = f"{table['title'].replace(' × the', 'x the')}, {size}"
        lines += [f"| {title} | real | teacher | student |", "| --- | ---: | ---: | ---: |"]
        for row in table["rows"]:
            cells = (f"{cell['mean']} ({cell['range']})" if cell["range"] else cell["mean"] for cell in row["cells"])
            lines.append(f"| {row['name']} | {' | '.join(cells)} |".replace("\N{NO-BREAK SPACE}", " "))
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    path = HERE / "digits-bench.json"
    if len(sys.argv) > 1:
        report = json.loads((Path(sys.argv[1]) / "report.json").read_text(encoding="utf-8"))
        found = {key: report[key] for key in KEYS if key in report}
        path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    found = json.loads(path.read_text(encoding="utf-8"))
    (HERE / "digits-bench.md").write_text(text(found), encoding="utf-8")
    plots.save(recognition_by_frame(found["digits_bench"]), HERE / "digits-bench.svg")
    print(text(found))


if __name__ == "__main__":
    main()
