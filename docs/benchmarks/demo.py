"""The table of the README from a finished demo: `make demo`, then `python docs/benchmarks/demo.py`.

Reads `runs/demo/report.json` (or the folder given) and writes `demo.json` and `demo.md` beside itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KEYS = (
    "dense_scalars_per_token",
    "latent_scalars_per_token",
    "reduction",
    "dense_cache_bytes",
    "latent_cache_bytes",
    "teacher_loss",
    "converted_loss",
    "student_loss",
    "loss_increase",
    "accuracy",
    "seconds",
    "versions",
)


def table(found: dict[str, Any]) -> str:
    """The table of the README."""
    teacher, converted, student = (found[key] for key in ("teacher_loss", "converted_loss", "student_loss"))
    lines = [
        "| | dense teacher | converted | distilled |",
        "| --- | ---: | ---: | ---: |",
        f"| cached scalars per token per layer | {found['dense_scalars_per_token']:g} "
        f"| {found['latent_scalars_per_token']:g} (-{100 * found['reduction']:.3f} %) "
        f"| {found['latent_scalars_per_token']:g} |",
        f"| cache of one stream (window of 10 frames, float32) | {found['dense_cache_bytes'] / 1e3:.0f} kB "
        f"| {found['latent_cache_bytes'] / 1e3:.1f} kB | {found['latent_cache_bytes'] / 1e3:.1f} kB |",
        f"| held-out loss | {teacher:.4f} | {converted:.4f} ({100 * (converted / teacher - 1):+.2f} %) "
        f"| {student:.4f} ({100 * (student / teacher - 1):+.2f} %) |",
    ]
    names = {"1x": f"prompted digit recognized at the training length ({found['prompts']} prompts)"}
    for length, share in found["accuracy"]["teacher"].items():
        name = names.get(length, f"prompted digit recognized at {length} the training length")
        lines.append(f"| {name} | {100 * share:.0f} % | | {100 * found['accuracy']['student'][length]:.0f} % |")
    return "\n".join(lines) + "\n"


def main() -> None:
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    found = {key: report[key] for key in KEYS if key in report} | {"prompts": report["digits_bench"]["prompts"]}
    (HERE / "demo.json").write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (HERE / "demo.md").write_text(table(found), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
