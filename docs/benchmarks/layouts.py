"""What each construction costs before any training: `python docs/benchmarks/layouts.py [--seeds 3]`.

Converts the embedded digits teacher at 28 of 384 cached scalars a token, VideoMLA's share, in every
layout and with every initialisation, one change at a time, and measures the held-out loss against
the teacher's on the same noise. Writes `layouts.json` and the table `layouts.md` beside itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import default_collate

from mla_convert.convert import CalibrationBatch, ConvertConfig, convert_model
from mla_convert.distill.data import DataConfig, open_data
from mla_convert.evaluate.fidelity import fidelity
from mla_convert.families.wan import FAMILY
from mla_convert.load import load_dense, load_source

ROWS: list[dict[str, Any]] = [
    {"position": "decoupled", "own_chunk": "latent", "init": "random", "kv_lora_rank": 24, "qk_rope_head_dim": 4},
    {"position": "decoupled", "own_chunk": "latent", "init": "svd", "kv_lora_rank": 24, "qk_rope_head_dim": 4},
    {"position": "decoupled", "own_chunk": "latent", "init": "activation", "kv_lora_rank": 24, "qk_rope_head_dim": 4},
    {"position": "decoupled", "own_chunk": "latent", "init": "activation", "kv_lora_rank": 16, "qk_rope_head_dim": 12},
    {"position": "decoupled", "own_chunk": "exact", "init": "svd", "kv_lora_rank": 16, "qk_rope_head_dim": 12},
    {"position": "decoupled", "own_chunk": "exact", "init": "activation", "kv_lora_rank": 16, "qk_rope_head_dim": 12},
    {"position": "baked", "own_chunk": "latent", "init": "activation", "kv_lora_rank": 20, "qk_rope_head_dim": 8},
    {"position": "baked", "own_chunk": "exact", "init": "activation", "kv_lora_rank": 20, "qk_rope_head_dim": 8},
    {"position": "derived", "own_chunk": "latent", "init": "activation", "kv_lora_rank": 28, "qk_rope_head_dim": 48},
    {"position": "derived", "own_chunk": "exact", "init": "activation", "kv_lora_rank": 28, "qk_rope_head_dim": 48},
    {"position": "rotate_on_read", "own_chunk": "latent", "init": "activation", "kv_lora_rank": 28},
    {"position": "rotate_on_read", "own_chunk": "exact", "init": "svd", "kv_lora_rank": 28},
    {"position": "rotate_on_read", "own_chunk": "exact", "init": "activation", "kv_lora_rank": 28},
    {"position": "rotate_on_read", "own_chunk": "exact", "init": "activation", "kv_lora_rank": 16},
    {"position": "rotate_on_read", "own_chunk": "exact", "init": "activation", "kv_lora_rank": 8},
]


def measure(teacher: Any, row: dict[str, Any], seed: int) -> dict[str, float]:
    config = ConvertConfig(calibration={"seed": seed}, **row)
    data = open_data(DataConfig(kind="digits"), seed)
    size = config.calibration.batch_size
    starts = range(0, config.calibration.clips, size)
    clips = (default_collate([data.example(start + i) for i in range(size)]) for start in starts)
    batches = [CalibrationBatch(clip["latents"], clip["encoder_hidden_states"]) for clip in clips]
    student = convert_model(FAMILY, teacher, config, batches, seed=seed)
    result = fidelity(student, teacher, data.heldout(64), batch_size=32, seed=0)
    return {
        "scalars": student.mla.scalars_per_token(),
        "loss_increase": result["loss_increase"],
        "velocity_rel_error": result["velocity_rel_error"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| `position` | `own_chunk` | `init` | latent + cached key | held-out loss | velocity error |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        loss, error = row["loss_increase"], row["velocity_rel_error"]
        key = round(row["scalars"]) - row["kv_lora_rank"]
        spread = "" if loss["max"] == loss["min"] else f" ({_percent(loss['min'])} to {_percent(loss['max'])})"
        cells = [
            f"`{row['position']}`",
            row["own_chunk"],
            row["init"],
            f"{row['kv_lora_rank']} + {key}" if key else f"{row['kv_lora_rank']}",
        ]
        cells += [_percent(loss["median"]) + spread, f"{100 * error['median']:.1f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _percent(share: float) -> str:
    return f"{100 * share:+.0f} %" if share >= 0.1 else f"{100 * share:+.2f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    teacher = load_dense(load_source("zoo:digits"))
    rows = []
    for row in ROWS:
        runs = [measure(teacher, row, seed) for seed in seeds]
        spread = {
            key: {
                "median": statistics.median(run[key] for run in runs),
                "min": min(run[key] for run in runs),
                "max": max(run[key] for run in runs),
            }
            for key in ("loss_increase", "velocity_rel_error")
        }
        rows.append({**row, "scalars": runs[0]["scalars"], **spread})
        print(rows[-1], file=sys.stderr, flush=True)
    folder = Path(__file__).parent
    result = {"torch": torch.__version__, "device": "cpu", "seeds": len(seeds), "rows": rows}
    (folder / "layouts.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / "layouts.md").write_text(table(rows))
    print(table(rows), end="")


if __name__ == "__main__":
    main()
