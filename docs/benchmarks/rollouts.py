"""What each construction does to rollouts before any training: `python docs/benchmarks/rollouts.py`.

Converts the digits teacher as rows of `layouts.py` do and measures two things. One is along the teacher's own
rollouts, four windows long: the held-out loss and velocity error on its generated clips, where every
chunk but the first sees a window of history that has moved on, or is full. The other is the rollouts of each
model from the same noise and prompts: the share that shows the prompted digit, in the last frame and over
all frames, at the training length and at 8 times that. Writes `rollouts.json` and `rollouts.md` beside itself;
models that the first holds already, measured alike, are not measured again (`--again` does).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from layouts import ROWS, converted, measured_alike, settings_of
from torch import Tensor

from mla_convert.distill.data import DataConfig, open_data
from mla_convert.evaluate.config import EvaluateConfig
from mla_convert.evaluate.fidelity import fidelity
from mla_convert.evaluate.rollouts import digit_rollouts, heldout_prompts
from mla_convert.load import load_dense, load_source
from mla_convert.zoo.digits.data import CLIP_FRAMES, GUIDANCE, SHIFT

CHOSEN = [1, 5, 8, 12, 13, 17, 19]
CLIPS, WINDOWS, LONG = 64, 4, 8


def shares(correct: Tensor) -> dict[str, float]:
    """Of `[N, F]`: rollouts whose last frame is right, and frames that are."""
    return {"last": float(correct[:, -1].double().mean()), "frames": float(correct.double().mean())}


def rolled_out(model: Any, config: EvaluateConfig) -> dict[str, dict[str, float]]:
    frames = {"1x": CLIP_FRAMES, f"{LONG}x": LONG * CLIP_FRAMES}
    return {name: shares(digit_rollouts(model, count, config)[1]) for name, count in frames.items()}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| `position` | `own_chunk` | `init` | loss along rollouts | velocity error | right at 1x | at 8x "
        "| frames right at 8x |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        made, loss = ["dense", "", ""], ["", ""]
        if "position" in row:
            notes = f", ranks {', '.join(map(str, row['ranks']))}" if "budget" in row else ""
            if (shared := row.get("layers_per_latent", 1)) > 1:
                notes = f", one latent of {row['ranks'][0]} for {shared} layers"
            made = [f"`{row['position']}`", row["own_chunk"], row["init"] + notes]
            loss = [f"{100 * row['loss_increase']:+.2f} %", f"{100 * row['velocity_rel_error']:.1f} %"]
        right = (row["rollouts"]["1x"]["last"], row["rollouts"]["8x"]["last"], row["rollouts"]["8x"]["frames"])
        lines.append("| " + " | ".join([*made, *loss, *(f"{100 * share:.0f} %" for share in right)]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=48, help="rollouts a model")
    parser.add_argument("--rows", type=int, nargs="*", default=CHOSEN, help="rows of layouts.py, from 0")
    parser.add_argument("--again", action="store_true", help="measure models anew that are there")
    chosen = parser.parse_args()
    arguments = argparse.Namespace(prompts=chosen.prompts, rows=chosen.rows)
    here = Path(__file__)
    path = here.with_suffix(".json")
    kept = [] if chosen.again else measured_alike(path, {"prompts": arguments.prompts})
    teacher = load_dense(load_source("zoo:digits"))
    config = EvaluateConfig(rollout_prompts=arguments.prompts, shift=SHIFT, guidance_scale=GUIDANCE)
    videos, _ = digit_rollouts(teacher, WINDOWS * CLIP_FRAMES, config)
    clips = {"latents": videos, "encoder_hidden_states": heldout_prompts(arguments.prompts)[0]}
    known = {json.dumps(settings_of(entry)): entry for entry in kept}
    rows: list[dict[str, Any]] = [known.get("{}") or {"rollouts": rolled_out(teacher, config)}]
    data = open_data(DataConfig(kind="digits"), 0)
    for row in [ROWS[i] for i in arguments.rows]:
        if entry := known.get(json.dumps(row)):
            rows.append(entry)
            continue
        student = converted(teacher, data, row, 0, CLIPS)
        found = fidelity(student, teacher, clips, batch_size=16, seed=0)
        errors = {key: found[key] for key in ("loss_increase", "velocity_rel_error")}
        ranks = list(student.mla.kv_lora_rank)
        rows.append({**row, "ranks": ranks, **errors, "rollouts": rolled_out(student, config)})
        print(rows[-1], file=sys.stderr, flush=True)
    result = {"torch": torch.__version__, "device": "cpu", "arguments": vars(arguments), "rows": rows}
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    here.with_suffix(".md").write_text(table(rows), encoding="utf-8")
    print(table(rows), end="")


if __name__ == "__main__":
    main()
