"""What each construction costs before any training: `python docs/benchmarks/layouts.py [--seeds 3]`.

Converts an embedded teacher at 28 of 384 cached scalars a token, VideoMLA's share, in every layout and
with every initialization, one change at a time, and measures the held-out loss against the teacher's
on the same noise. Writes `layouts-NAME.json` and the table `layouts-NAME.md` beside itself, after every row;
rows that the first holds already, measured alike, are not measured again (`--again` does). The digits are
made as they are needed; for the natural clips `--model zoo:natural --data FOLDER` reads what
`python -m mla_convert.zoo.natural.data --out FOLDER` has written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from mla_convert.convert import ConvertConfig, clip_batches, convert_model
from mla_convert.distill.data import Data, DataConfig, open_data
from mla_convert.evaluate.fidelity import fidelity
from mla_convert.families.wan import FAMILY
from mla_convert.load import load_dense, load_source


def _row(position: str, own_chunk: str, init: str, latent: int, key: int = 0, **more: Any) -> dict[str, Any]:
    config = {"position": position, "own_chunk": own_chunk, "init": init, **more}
    if "budget" not in more:
        config["kv_lora_rank"] = latent
    return config | ({"qk_rope_head_dim": key} if key else {})


def _budget(scalars: float) -> dict[str, Any]:
    return {"budget": {"scalars_per_token": scalars, "rank_multiple": 4}}


ROWS: list[dict[str, Any]] = [
    _row("decoupled", "latent", "random", 24, 4),
    _row("decoupled", "latent", "svd", 24, 4),
    _row("decoupled", "latent", "activation", 20, 8),
    _row("decoupled", "exact", "svd", 20, 8),
    _row("decoupled", "exact", "activation", 20, 8, key_mean=False),
    _row("decoupled", "exact", "activation", 20, 8),
    _row("baked", "latent", "activation", 22, 6),
    _row("baked", "exact", "activation", 22, 6),
    _row("derived", "exact", "activation", 28, 32),
    _row("rotate_on_read", "latent", "activation", 28),
    _row("rotate_on_read", "exact", "svd", 28),
    _row("rotate_on_read", "exact", "activation", 28, calibration={"metric": "output"}),
    _row("rotate_on_read", "exact", "activation", 28),
    _row("rotate_on_read", "exact", "activation", 28, **_budget(28)),
    _row("rotate_on_read", "exact", "activation", 14, **_budget(14)),
    _row("rotate_on_read", "exact", "activation", 8, **_budget(8)),
    _row("rotate_on_read", "exact", "activation", 56, layers_per_latent=2),
    _row("rotate_on_read", "exact", "activation", 112, layers_per_latent=4),
    _row("derived", "exact", "activation", 112, 32, layers_per_latent=4),
    _row("rotate_on_read", "exact", "activation", 56, layers_per_latent=4),
    _row("rotate_on_read", "exact", "activation", 32, layers_per_latent=4),
]


def data_of(folder: str | None) -> Data:
    """The latents of a `folder`, or without one the digits that are made as they are needed."""
    natural = {"kind": "latents", "folder": folder, "text_tokens": 1, "heldout": 128, "split": "last"}
    return open_data(DataConfig(**(natural if folder else {"kind": "digits"})), 0)


def converted(teacher: Any, data: Data, row: dict[str, Any], seed: int, clips: int, max_tokens: int = 65536) -> Any:
    """The teacher in the layout of a row; every seed draws clips of its own."""
    calibration = {"clips": clips, "max_tokens": max_tokens, "seed": seed, **row.get("calibration", {})}
    config = ConvertConfig(**{**row, "calibration": calibration})
    batches = clip_batches(data.example, range(seed * clips, (seed + 1) * clips), config.calibration.batch_size)
    return convert_model(FAMILY, teacher, config, batches, seed=seed)


def measure(teacher: Any, data: Data, row: dict[str, Any], seed: int, clips: int, heldout: int) -> dict[str, Any]:
    student = converted(teacher, data, row, seed, clips)
    result = fidelity(student, teacher, data.heldout(heldout), batch_size=16, seed=0)
    return {
        "scalars": student.mla.scalars_per_token(),
        "ranks": list(student.mla.kv_lora_rank),
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
        shared = row.get("layers_per_latent", 1)
        spread = "" if loss["max"] == loss["min"] else f" ({signed(loss['min'])} to {signed(loss['max'])})"
        notes = ["key mean in the latent"] if row.get("key_mean") is False else []
        notes += ["metric `output`"] if "calibration" in row else []
        notes += [f"ranks {', '.join(map(str, row['ranks']))}"] if "budget" in row else []
        notes += [f"one latent of {row['ranks'][0]} for {shared} layers"] if shared > 1 else []
        cells = [f"`{row['position']}`", row["own_chunk"], ", ".join([row["init"], *notes])]
        cells += [cached(row), signed(loss["median"]) + spread]
        lines.append("| " + " | ".join([*cells, f"{100 * error['median']:.1f} %"]) + " |")
    return "\n".join(lines) + "\n"


def cached(row: dict[str, Any]) -> str:
    """Cached scalars a token a layer: of the latent and, if there is one, of the shared key."""
    latent = statistics.mean(row["ranks"]) / row.get("layers_per_latent", 1)
    key = round(row["scalars"] - latent)
    return f"{latent:g} + {key}" if key else f"{latent:g}"


def signed(share: float) -> str:
    return f"{100 * share:+.0f} %" if share >= 0.1 else f"{100 * share:+.2f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", default="zoo:digits")
    parser.add_argument("--data", help="folder of latents; the digits teacher makes its own clips")
    parser.add_argument("--clips", type=int, default=64, help="calibration clips, a multiple of 16")
    parser.add_argument("--heldout", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="*", help="numbers of the rows to measure, from 0; all by default")
    parser.add_argument("--again", action="store_true", help="measure rows anew that are there")
    chosen = parser.parse_args()
    arguments = argparse.Namespace(**{name: value for name, value in vars(chosen).items() if name != "again"})
    folder, name = Path(__file__).parent, arguments.model.split(":")[-1]
    path = folder / f"layouts-{name}.json"
    same = {name: getattr(arguments, name) for name in ("seeds", "model", "clips", "heldout")}
    kept = [] if chosen.again else measured_alike(path, same)
    teacher = load_dense(load_source(arguments.model))
    rows: list[dict[str, Any]] = []
    wanted = [ROWS[i] for i in arguments.rows] if arguments.rows else ROWS
    for row in wanted:
        if known := next((entry for entry in kept if settings_of(entry) == row), None):
            rows.append(known)
            continue
        runs = [
            measure(teacher, data_of(arguments.data), row, seed, arguments.clips, arguments.heldout)
            for seed in range(arguments.seeds)
        ]
        spread = {
            key: {
                "median": statistics.median(run[key] for run in runs),
                "min": min(run[key] for run in runs),
                "max": max(run[key] for run in runs),
            }
            for key in ("loss_increase", "velocity_rel_error")
        }
        rows.append({**row, "scalars": runs[0]["scalars"], "ranks": runs[0]["ranks"], **spread})
        print(rows[-1], file=sys.stderr, flush=True)
        # What is kept but comes later stays in the file until its turn.
        later = [entry for entry in kept if entry not in rows and settings_of(entry) in wanted]
        result = {"torch": torch.__version__, "device": "cpu", "arguments": vars(arguments), "rows": rows + later}
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (folder / f"layouts-{name}.md").write_text(table(rows), encoding="utf-8")
    print(table(rows), end="")


def settings_of(entry: dict[str, Any]) -> dict[str, Any]:
    """The row that a result belongs to; nothing for a dense model."""
    return {key: value for key, value in entry.items() if key in ConvertConfig.model_fields}


def measured_alike(path: Path, same: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier result, none if there is none or these arguments were others."""
    if not path.exists():
        return []
    result = json.loads(path.read_text(encoding="utf-8"))
    alike = result["torch"] == torch.__version__ and all(result["arguments"][key] == same[key] for key in same)
    return list(result["rows"]) if alike else []


if __name__ == "__main__":
    main()
