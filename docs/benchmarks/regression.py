"""What `match_attention` adds to a conversion: `python docs/benchmarks/regression.py [--seeds 3]`.

Takes rows of `layouts.py`, the best layout at three sizes and the paper's with an exact own chunk, converts the
digits teacher with each on twice as many clips as there, and regresses every layer's attention on the teacher's
for two to three CPU minutes. Loss and velocity error are those of `layouts.py`. Writes `regression.json` and
`regression.md` beside itself after every row; rows that the first holds are not measured again (`--again` does).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from layouts import ROWS, cached, converted, signed

from mla_convert.distill.data import Data, DataConfig, open_data
from mla_convert.distill.stages.match_attention import MatchAttentionConfig
from mla_convert.distill.trainer import run_stage
from mla_convert.evaluate.fidelity import fidelity
from mla_convert.load import load_dense, load_source

HERE = Path(__file__)
CHOSEN = (5, 17, 19, 20)
CLIPS, HELDOUT = 128, 64
STAGE = {
    "steps": 200,
    "learning_rate": 1e-4,
    "warmup_steps": 10,
    "schedule": "cosine",
    "batch_size": 8,
    "metric": "output",
    "trainable": "latent",
    "checkpoint_every": None,
    "tracker": None,
}


def measure(teacher: Any, data: Data, row: dict[str, Any], seed: int) -> dict[str, Any]:
    """A conversion before and after the stage, and the CPU seconds that the stage took."""
    student = converted(teacher, data, row, seed, CLIPS, max_tokens=131072)
    heldout = data.heldout(HELDOUT)
    found: dict[str, Any] = {"ranks": list(student.mla.kv_lora_rank), "scalars": student.mla.scalars_per_token()}
    found["before"] = fidelity(student, teacher, heldout, batch_size=16, seed=0)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        stage = MatchAttentionConfig(**STAGE)
        run_stage(stage, student, {"teacher": teacher}, data, None, Path(folder), seed, 1)
    found["cpu_seconds"] = time.process_time() - began
    found["after"] = fidelity(student, teacher, heldout, batch_size=16, seed=0)
    for when in ("before", "after"):
        found[when] = {key: found[when][key] for key in ("loss_increase", "velocity_rel_error")}
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| `position` | latent + cached key | loss before | loss after | velocity error before | after | CPU minutes |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        runs = row["runs"]
        cells = [f"`{row['settings']['position']}`", cached({**row["settings"], **runs[0]})]
        for when in ("before", "after"):
            losses = sorted(run[when]["loss_increase"] for run in runs)
            spread = f" ({signed(losses[0])} to {signed(losses[-1])})" if len(losses) > 1 else ""
            cells.append(signed(statistics.median(losses)) + spread)
        for when in ("before", "after"):
            cells.append(f"{100 * statistics.median(run[when]['velocity_rel_error'] for run in runs):.1f} %")
        cells.append(f"{max(run['cpu_seconds'] for run in runs) / 60:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="measure rows anew that are there")
    arguments = parser.parse_args()
    path = HERE.with_suffix(".json")
    kept: list[dict[str, Any]] = []
    if path.exists() and not arguments.again:
        stored = json.loads(path.read_text())
        kept = stored["rows"] if stored["stage"] == STAGE and stored["seeds"] == arguments.seeds else []
    teacher, data = load_dense(load_source("zoo:digits")), open_data(DataConfig(kind="digits"), 0)
    rows: list[dict[str, Any]] = []
    for number in CHOSEN:
        row = next((known for known in kept if known["settings"] == ROWS[number]), None)
        if row is None:
            runs = [measure(teacher, data, ROWS[number], seed) for seed in range(arguments.seeds)]
            row = {"settings": ROWS[number], "runs": runs}
            print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
        result = {"torch": torch.__version__, "device": "cpu", "threads": torch.get_num_threads()}
        result |= {"seeds": arguments.seeds, "stage": STAGE, "rows": rows}
        path.write_text(json.dumps(result, indent=2) + "\n")
        HERE.with_suffix(".md").write_text(table(rows))
    print(table(rows), end="")


if __name__ == "__main__":
    main()
