"""What every stage of training does, from several initializations: `python docs/benchmarks/stages.py`.

Takes the stages of `recipes/bench/stages.yaml` and runs them on the digits teacher converted at 28 of 384
scalars a token in several ways, and the few-step stages on the dense teacher itself. After every stage it
measures the held-out loss and rollouts of held-out prompts: with eight guided steps while the model is one of
many steps, with four unguided ones always. Writes `stages.json` after every measurement and, from all that is
in it, `stages.md`, `stages-steps.md` and `stages.svg` beside itself. What is there is not run again and what was
stopped goes on where it was, from its checkpoints in `--work`, so a table may take several days:
`--rows shared dense --seeds 0 1 2`; `--until match_velocity` stops each row after that stage, and
`--only-table` draws what there is.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import study
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor

from mla_convert.convert import ConvertConfig, clip_batches, convert_model
from mla_convert.devices import default_device
from mla_convert.distill.data import open_data
from mla_convert.distill.metrics import Metrics
from mla_convert.distill.objective import flow_loss
from mla_convert.distill.trainer import run_stage
from mla_convert.evaluate.config import EvaluateConfig
from mla_convert.evaluate.rollouts import chosen_prompts, digit_rollouts
from mla_convert.evaluate.video_metrics import estimate, frame_metrics
from mla_convert.export.manifest import versions
from mla_convert.families.causal import LatentTransformer
from mla_convert.families.wan import FAMILY
from mla_convert.files import atomic_file, save_tensors, write_json, write_text
from mla_convert.load import load_dense, load_source
from mla_convert.recipe.load import load_recipe
from mla_convert.recipe.schema import Recipe
from mla_convert.recipe.shipped import find_recipe
from mla_convert.zoo.digits.data import CLIP_FRAMES, GUIDANCE, SHIFT

HERE = Path(__file__)
RECIPE = "bench/stages"
DENSE = "dense"
# A start that is far off has more to learn than its latent projections: what is changed about the repair.
FAR = {"learning_rate": 1e-3, "trainable": "all", "context_noise": 0.3, "steps": 600, "eval_every": 50}
# What a row changes about the recipe's conversion: the paper's construction, and the same from random numbers.
PAPER = {
    "position": "decoupled",
    "own_chunk": "latent",
    "layers_per_latent": 1,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 4,
}
ROWS: dict[str, dict[str, Any]] = {
    "shared": {},
    DENSE: {},
    "activation": {"layers_per_latent": 1, "kv_lora_rank": 28},
    "shared-far": {},
    "svd": {**PAPER, "init": "svd"},
    "random": {**PAPER, "init": "random"},
}
# The good start is repaired in this way too, so that three starts can be compared.
FAR_ROWS = ("shared-far", "svd", "random")
FEW_STEP = ("consistency", "dmd")
MANY, FEW = "guided", "few"
LONG = 8
NEAR = 1.02


@dataclasses.dataclass
class Bench:
    """The recipe, its teacher, and what is done: `prompts` rollouts, `long_prompts` of the long guided ones."""

    recipe: Recipe
    work: Path
    prompts: int
    long_prompts: int
    until: str | None
    device: str

    def __post_init__(self) -> None:
        self.teacher = load_dense(load_source(self.recipe.source.model)).to(self.device)

    def stages(self, row: str) -> list[tuple[int, Any]]:
        """The stages of a row with their number in the recipe; the dense teacher needs no repair."""
        changes = FAR if row in FAR_ROWS else {}
        repaired = (
            stage if stage.stage in FEW_STEP else type(stage)(**{**stage.model_dump(), **changes})
            for stage in self.recipe.distill
        )
        numbered = enumerate(repaired, 1)
        chosen = [(index, stage) for index, stage in numbered if row != DENSE or stage.stage in FEW_STEP]
        last = max((place for place, (_, stage) in enumerate(chosen) if stage.stage == self.until), default=None)
        return chosen if last is None else chosen[: last + 1]

    def start(self, row: str, seed: int) -> Any:
        """The model that a row begins with."""
        if row == DENSE:
            return load_dense(load_source(self.recipe.source.model))
        settings = self.recipe.convert.model_dump(mode="json", exclude_unset=True) | ROWS[row]
        calibration = {**settings.pop("calibration"), "seed": seed}
        config = ConvertConfig(**settings, calibration=calibration)
        clips = config.calibration.clips
        chosen = range(seed * clips, (seed + 1) * clips)
        batches = clip_batches(open_data(self.recipe.data, seed).example, chosen, config.calibration.batch_size)
        # What a conversion keeps it shares with the teacher, which must stay as it is while all of the student learns.
        return copy.deepcopy(convert_model(FAMILY, self.teacher, config, batches, seed=seed))

    def measure(self, model: Any, clips: dict[str, Tensor], many: bool) -> dict[str, Any]:
        """Held-out loss, and rollouts: of a model of `many` steps the long ones are guided."""
        model = model.to(self.device)
        found: dict[str, Any] = {"heldout_loss": flow_loss(model, clips)}
        if isinstance(model, LatentTransformer):
            found["rank_used"] = statistics.mean(row["rank99"] / row["rank"] for row in study.rank_used(model))
        if many:
            found[MANY] = {"1x": rolled_out(model, CLIP_FRAMES, self.prompts, 8, GUIDANCE)}
            if self.long_prompts:
                found[MANY][f"{LONG}x"] = rolled_out(model, LONG * CLIP_FRAMES, self.long_prompts, 8, GUIDANCE)
            found[FEW] = {"1x": rolled_out(model, CLIP_FRAMES, self.prompts, 4, 1.0)}
        else:
            lengths = {"1x": CLIP_FRAMES, f"{LONG}x": LONG * CLIP_FRAMES}
            found[FEW] = {name: rolled_out(model, frames, self.prompts, 4, 1.0) for name, frames in lengths.items()}
        return found


def rolled_out(model: Any, frames: int, prompts: int, steps: int, guidance: float) -> dict[str, Any]:
    """Of rollouts of held-out prompts: digits recognized in the last frame and over all, places right over all."""
    config = EvaluateConfig(rollout_prompts=prompts, num_inference_steps=steps, shift=SHIFT, guidance_scale=guidance)
    videos, _ = digit_rollouts(model, frames, config)
    values = frame_metrics(videos, chosen_prompts(prompts))
    digit, motion = values["digit_accuracy"], values["motion_accuracy"]
    return {
        "prompts": prompts,
        "digit_last": float(digit[:, -1].mean()),
        "digit": dataclasses.asdict(estimate(digit)),
        "motion": dataclasses.asdict(estimate(motion)),
    }


def run(bench: Bench, row: str, seed: int, results: list[dict[str, Any]]) -> None:
    """Add to `results` what is missing of a row and seed, and write them after every stage."""
    entry = next((e for e in results if (e["row"], e["seed"]) == (row, seed)), None)
    stages, work = bench.stages(row), bench.work / f"{row}-{seed}"
    if entry is not None and len(entry["stages"]) > len(stages):
        return
    kept = [work / f"{index:02d}-{config.stage}.safetensors" for index, config in stages]
    if entry is None or not all(path.is_file() for path in kept[: len(entry["stages"]) - 1]):
        results[:] = [e for e in results if e is not entry]
        changes = {"convert": ROWS[row], "repair": FAR if row in FAR_ROWS else {}}
        entry = {"row": row, "seed": seed, **changes, **environment(bench.device), "stages": [], "curve": []}
        results.append(entry)
    data = open_data(bench.recipe.data, seed)
    clips = data.heldout(bench.recipe.evaluate.clips)
    entry["teacher_loss"] = flow_loss(bench.teacher, clips)
    clock = Clock()
    model = bench.start(row, seed)
    if not entry["stages"]:
        entry["stages"].append({"stage": "start", **clock.spent(), **bench.measure(model, clips, many=True)})
        write(results)
    done = len(entry["stages"]) - 1
    if done:
        model.load_state_dict(load_file(kept[done - 1]))
    for path, (index, config) in list(zip(kept, stages, strict=True))[done:]:
        folder, clock = path.with_suffix(""), Clock()
        result = run_stage(config, model, {"teacher": bench.teacher}, data, clips, folder, seed, index, told(row, seed))
        found = {"stage": config.stage, "steps": config.steps, "resumed_from": result.resumed_from, **clock.spent()}
        with atomic_file(path) as temporary:
            save_tensors(model.state_dict(), temporary)
        many = config.stage not in FEW_STEP
        if many:
            # Where it is resumed the rows of before are in the same file.
            logged = [r for r in Metrics(folder / "metrics.jsonl").rows() if "heldout_loss" in r]
            before = entry["curve"][-1][0] if entry["curve"] else 0
            entry["curve"] += [[before + r["step"], r["heldout_loss"]] for r in logged]
        entry["stages"].append({**found, **bench.measure(model, clips, many)})
        write(results)


class Clock:
    """Seconds since it was made, by the wall and of this process's CPU time."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.monotonic(), time.process_time()

    def spent(self) -> dict[str, float]:
        return {
            "seconds": round(time.monotonic() - self.wall, 1),
            "cpu_seconds": round(time.process_time() - self.cpu, 1),
        }


def environment(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"device": name, "threads": torch.get_num_threads(), "versions": versions()}


def told(row: str, seed: int) -> Any:
    def report(stage: str, done: int, total: int, note: str = "") -> None:
        if done % 5 == 0 or done == total:
            print(f"{row}-{seed} {stage} {done}/{total} {note}", file=sys.stderr, flush=True)

    return report


def near(entry: dict[str, Any]) -> int | None:
    """The first step whose held-out loss is within 2 % of the teacher's, None if there is none."""
    limit = NEAR * entry["teacher_loss"]
    return next((step for step, loss in entry["curve"] if loss <= limit), None)


def finished_rows(results: list[dict[str, Any]]) -> Iterable[tuple[str, list[dict[str, Any]]]]:
    """The entries of each row, seeds together."""
    for row in ROWS:
        entries = [entry for entry in results if entry["row"] == row]
        if entries:
            yield row, entries


def spread(values: list[float], form: str) -> str:
    """The median of the seeds and, where they differ, their range."""
    shown = [form.format(value) for value in (statistics.median(values), min(values), max(values))]
    return shown[0] if len(set(shown)) == 1 else f"{shown[0]} ({shown[1]} to {shown[2]})"


def name_of(row: str) -> str:
    if row == DENSE:
        return "dense teacher"
    best = "`rotate_on_read`, own chunk exact, `activation`"
    shared = f"{best}, one latent for all layers"
    named = {"activation": best, "shared": shared, "shared-far": f"{shared}, repaired as a bad start"}
    return named.get(row, f"`decoupled`, `{row}`")


def table(results: list[dict[str, Any]]) -> str:
    """A line for each row and stage."""
    lines = [
        "| start | after | seeds | held-out loss | digit, many steps, 1x | 8x | digit, 4 steps, 1x | 8x "
        "| place, 4 steps, 1x | 8x |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row, entries in finished_rows(results):
        for number in range(max(len(entry["stages"]) for entry in entries)):
            reached = [entry for entry in entries if len(entry["stages"]) > number]
            found = [entry["stages"][number] for entry in reached]
            rise = [f["heldout_loss"] / e["teacher_loss"] - 1 for f, e in zip(found, reached, strict=True)]
            percent = "{:+.2%}" if max(map(abs, rise)) < 1 else "{:+.0%}"
            cells = [name_of(row), f"`{found[0]['stage']}`" if number else "", str(len(found))]
            cells.append("" if row == DENSE and not number else spread(rise, percent).replace("%", " %"))
            for kind, length, metric in [
                *((MANY, length, "digit") for length in ("1x", f"{LONG}x")),
                *((FEW, length, "digit") for length in ("1x", f"{LONG}x")),
                *((FEW, length, "motion") for length in ("1x", f"{LONG}x")),
            ]:
                shares = [f[kind][length][metric]["mean"] for f in found if length in f.get(kind, {})]
                cells.append(spread(shares, "{:.1%}").replace("%", " %") if shares else "")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def steps_table(results: list[dict[str, Any]]) -> str:
    """How far each initialization comes in the stages of many steps."""
    lines = [
        "| start | steps | held-out loss at the start | at the end | steps to within 2 % of the teacher "
        "| rank used at the start | at the end |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row, entries in finished_rows(results):
        entries = [entry for entry in entries if entry["curve"]]
        if not entries:
            continue
        last = entries[0]["curve"][-1][0]
        ends = [[e["curve"][at][1] / e["teacher_loss"] - 1 for e in entries] for at in (0, -1)]
        shown = [spread(end, "{:+.2%}" if max(end) < 1 else "{:+.0%}").replace("%", " %") for end in ends]
        first = ", ".join(str(found) if (found := near(e)) is not None else f"not within {last}" for e in entries)
        ranks = [[e["stages"][at].get("rank_used") for e in entries if len(e["stages"]) > at] for at in (0, 1)]
        used = [spread(known, "{:.2f}") if (known := [u for u in stage if u]) else "" for stage in ranks]
        lines.append(f"| {name_of(row)} | {last} | {' | '.join(shown)} | {first} | {' | '.join(used)} |")
    return "\n".join(lines) + "\n"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Held-out loss over the steps, by initialization, all seeds."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for number, (row, entries) in enumerate(finished_rows(results)):
        for seed, entry in enumerate(entries):
            if entry["curve"]:
                steps, losses = zip(*entry["curve"], strict=True)
                share = [loss / entry["teacher_loss"] for loss in losses]
                axes.plot(steps, share, color=f"C{number}", label=None if seed else name_of(row).replace("`", ""))
    axes.axhline(1, color="black", linewidth=0.8)
    axes.axhline(NEAR, color="black", linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="held-out loss / teacher's")
    if axes.lines[2:]:
        axes.legend(frameon=False, fontsize=8, loc="upper right")
    # No date and fixed identifiers: the same results give the same bytes.
    with atomic_file(path) as temporary, rc_context({"svg.hashsalt": "stages"}):
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def write(results: list[dict[str, Any]]) -> None:
    """The results and what is drawn from them."""
    write_json(HERE.with_suffix(".json"), results)
    write_text(HERE.with_suffix(".md"), table(results))
    write_text(HERE.with_name("stages-steps.md"), steps_table(results))
    plot(results, HERE.with_suffix(".svg"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=24, help="rollouts a measurement")
    parser.add_argument("--long-prompts", type=int, default=12, help="the same of the long guided ones; 0 for none")
    parser.add_argument("--until", help="the last stage to run")
    parser.add_argument("--work", type=Path, default=Path("runs/stages"), help="checkpoints of what is under way")
    parser.add_argument("--only-table", action="store_true")
    arguments = parser.parse_args()
    kept = HERE.with_suffix(".json")
    results = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else []
    if not arguments.only_table:
        device = default_device().type
        recipe = load_recipe(find_recipe(RECIPE))
        bench = Bench(recipe, arguments.work, arguments.prompts, arguments.long_prompts, arguments.until, device)
        for seed in arguments.seeds:
            for row in arguments.rows:
                run(bench, row, seed, results)
    write(results)
    print(table(results), steps_table(results), sep="\n", end="")


if __name__ == "__main__":
    main()
