"""What `match_attention` adds to a conversion: `python docs/benchmarks/regression.py [--seeds 3]`.

Takes rows of `layouts.py`, the best layout at three sizes and the paper's with an exact own chunk, converts the
digits teacher with each on twice as many clips as there, and regresses every layer's attention on the teacher's
for two to three CPU minutes. Loss and velocity error are those of `layouts.py`. Writes `regression.json` and
`regression.md` beside itself after every row; rows that the first holds are not measured again (`--again` does).
`--model zoo:natural --data FOLDER --clips 32 --heldout 16 --rows 17` does the same with the teacher of natural
video, on the clips of `layouts.py`, into `regression-natural.json` and `.md`.
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
from layouts import ROWS, cached, converted, data_of, signed

from mla_convert.distill.data import Data
from mla_convert.distill.stages.match_attention import MatchAttentionConfig
from mla_convert.distill.trainer import run_stage
from mla_convert.evaluate.fidelity import fidelity
from mla_convert.load import load_dense, load_source

HERE = Path(__file__)
CHOSEN = (5, 17, 19, 20)
DIGITS = "zoo:digits"
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


def measure(teacher: Any, data: Data, row: dict[str, Any], seed: int, clips: int, heldout_clips: int) -> dict[str, Any]:
    """A conversion before and after the stage, and the CPU seconds that the stage took."""
    student = converted(teacher, data, row, seed, clips, max_tokens=1024 * clips)
    heldout = data.heldout(heldout_clips)
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
    parser.add_argument("--model", default=DIGITS)
    parser.add_argument("--data", help="folder of latents; the digits teacher makes its own clips")
    parser.add_argument("--clips", type=int, default=128, help="calibration clips, a multiple of 16")
    parser.add_argument("--heldout", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="*", default=CHOSEN, help="rows of layouts.py, from 0")
    parser.add_argument("--again", action="store_true", help="measure rows anew that are there")
    arguments = parser.parse_args()
    name = HERE.stem if arguments.model == DIGITS else f"{HERE.stem}-{arguments.model.split(':')[-1]}"
    path = HERE.with_name(f"{name}.json")
    same = {"model": arguments.model, "clips": arguments.clips, "heldout": arguments.heldout, "seeds": arguments.seeds}
    kept: list[dict[str, Any]] = []
    if path.exists() and not arguments.again:
        stored = json.loads(path.read_text(encoding="utf-8"))
        kept = stored["rows"] if {**same, "stage": STAGE}.items() <= stored.items() else []
    teacher, data = load_dense(load_source(arguments.model)), data_of(arguments.data)
    rows: list[dict[str, Any]] = []
    for number in arguments.rows:
        row = next((known for known in kept if known["settings"] == ROWS[number]), None)
        if row is None:
            runs = [
                measure(teacher, data, ROWS[number], seed, arguments.clips, arguments.heldout)
                for seed in range(arguments.seeds)
            ]
            row = {"settings": ROWS[number], "runs": runs}
            print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
        result = {"torch": torch.__version__, "device": "cpu", "threads": torch.get_num_threads()}
        result |= {**same, "stage": STAGE, "rows": rows}
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(table(rows), encoding="utf-8")
    print(table(rows), end="")


if __name__ == "__main__":
    main()
