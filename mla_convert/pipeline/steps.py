"""Defines the steps of a run and their order. Each step reads its input from disk and writes its output atomically."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..convert import convert_source
from ..devices import all_threads
from ..distill.trainer import run_stage
from ..evaluate.fidelity import evaluate
from ..evaluate.report import REPORT_HTML, REPORT_JSON, finite, write_report
from ..export.checkpoint import save_checkpoint
from ..export.release import export
from ..files import MANIFEST, write_json, write_text
from ..recipe.schema import Recipe, continued
from ..registry import stage_of
from ..run.latents import prompt_encoder
from ..run.offload import together
from .calibration import calibration_batches
from .context import CHECKPOINT, DATA, METRICS, SAMPLES, STAGES, TRAINING, Context, stage_names
from .preview import preview_strip
from .rollouts import roll_out_data
from .samples import comparisons, make_samples
from .summary import build_report, training_rows

STREAMED_SHARD_SIZE = "1GB"


@dataclass(frozen=True)
class Step:
    """One step of a run.

    `paths` are the files and folders it writes, `scratch` a folder that is deleted once the step is done; all are
    relative to the run folder. `reads_clips`: the step reads training data. `everywhere`: every process of a
    distributed run takes part. `stage` is the index in `distill` of the stage it trains, if any.
    """

    name: str
    paths: tuple[str, ...]
    action: Callable[[Context], None]
    scratch: str | None = None
    reads_clips: bool = False
    everywhere: bool = False
    stage: int | None = None

    @property
    def trains(self) -> bool:
        """Whether the step trains a stage of `distill`."""
        return self.stage is not None


def steps_of(recipe: Recipe) -> list[Step]:
    """The steps of a run of `recipe`, in order."""
    stages = stage_names(recipe)
    models = [(f"{STAGES}/{stage}/transformer", f"{STAGES}/{stage}/{MANIFEST}") for stage in stages]
    calibrated = recipe.convert.init == "activation"
    steps = []
    if recipe.data.kind == "rollouts":
        steps.append(Step("data", (DATA,), roll_out_data, everywhere=True))
    steps.append(Step("convert", models[0], _convert, scratch=_parts_of(recipe), reads_clips=calibrated))
    for index in range(1, len(stages)):
        steps.append(
            Step(
                f"distill {stages[index]}",
                (*models[index], *_left_for_later(recipe, index)),
                functools.partial(_distill, index=index),
                scratch=f"{TRAINING}/{stages[index]}/checkpoints",
                reads_clips=True,
                everywhere=True,
                stage=index - 1,
            )
        )
    reports = tuple(f"{STAGES}/{stages[index]}/{REPORT_JSON}" for index in _measured(recipe))
    steps.append(Step("evaluate", reports, _evaluate, reads_clips=True))
    steps.append(Step("export", (CHECKPOINT,), _export))
    if recipe.generate.prompts:
        steps.append(Step("samples", (SAMPLES,), make_samples))
    steps.append(Step("report", (METRICS, REPORT_JSON, REPORT_HTML), _report))
    return steps


def _left_for_later(recipe: Recipe, index: int) -> list[str]:
    """The file of the second network of stage `index`, if a later stage continues it."""
    second = stage_of(recipe.distill[index - 1]).second
    if second is None or all(continued(recipe, later) != index for later in range(index + 1, len(recipe.distill) + 1)):
        return []
    return [f"{TRAINING}/{stage_names(recipe)[index]}/{second.file}"]


def _measured(recipe: Recipe) -> list[int]:
    """Indices of the stages whose models are evaluated: the conversion and the last stage."""
    return sorted({0, len(recipe.distill)})


def recorded(context: Context) -> dict[str, Any]:
    """Entries of a checkpoint's manifest that cannot be derived from the checkpoint itself."""
    return {
        "recipe": context.recipe.model_dump(mode="json"),
        "source": context.source.provenance(),
        "prompt_encoder": prompt_encoder(context.source.config),
    }


def _convert(context: Context) -> None:
    recipe = context.recipe
    work = context.path / _parts_of(recipe)
    identity = recipe.model_dump(
        mode="json", include={"seed": True, "data": True, "generate": True, "source": {"noise_range"}}
    )
    if recipe.convert.init == "activation":
        identity["clips"] = context.data.identity
    with all_threads():
        converted = convert_source(
            context.source,
            recipe.convert,
            work,
            calibration_batches(context, work),
            seed=recipe.seed,
            dtype=context.dtype,
            progress=context.report,
            device=context.device,
            identity=identity,
        )
    folder = context.stage_folder(0)
    save_checkpoint(
        converted.model, folder, recorded(context), max_shard_size=STREAMED_SHARD_SIZE, tensors=converted.tensors
    )


def _parts_of(recipe: Recipe) -> str:
    """Where the conversion stores its finished parts, relative to the run folder."""
    return f"{STAGES}/.{stage_names(recipe)[0]}.parts"


def _distill(context: Context, index: int) -> None:
    recipe = context.recipe
    context.share_clips()
    student, stage = context.load_stage(index - 1), recipe.distill[index - 1]
    run_stage(
        stage,
        student,
        context.networks(stage),
        context.data,
        context.data.heldout(recipe.evaluate.clips),
        context.training_folder(index),
        recipe.seed,
        index,
        context.report,
        preview_strip,
        context.second_start(index),
        context.load_dense,
        context.start(index),
        context.image_latent(stage),
    )
    # Free the device's memory: the next stage may not use the teacher.
    context.unload_dense()
    if context.main:
        save_checkpoint(student, context.stage_folder(index), recorded(context))


def _evaluate(context: Context) -> None:
    recipe = context.recipe
    teacher = context.dense()
    for index in _measured(recipe):
        config = recipe.evaluate
        if index != len(recipe.distill):
            config = config.model_copy(update={"rollout_prompts": 0})
        student = context.load_stage(index, context.dtype)
        recipe.streaming.dense.apply(teacher)
        recipe.streaming.apply(student)
        with together([teacher, student], context.device):
            result = evaluate(student, teacher, context.data, config, context.report)
        # Free it before the next student is loaded.
        del student
        write_json(context.stage_folder(index) / REPORT_JSON, finite(result))


def _export(context: Context) -> None:
    recipe = context.recipe
    # Sections such as `export` or `generate` may have changed since the model was written.
    resolved = recipe.model_dump(mode="json")
    # The model is sampled at the size that it was trained at, which the checkpoint could not tell without its clips.
    resolved["generate"] = context.generate.model_dump(mode="json")
    export(context.stage_folder(-1), context.path / CHECKPOINT, recipe.export, resolved, replace=True)


def _report(context: Context) -> None:
    rows = training_rows(context)
    write_text(context.path / METRICS, "".join(json.dumps(row) + "\n" for row in rows))
    write_report(context.path, build_report(context), comparisons(context))
