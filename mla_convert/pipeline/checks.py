"""What a run refuses before it writes anything: all that would fail hours later."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..convert.limits import planned_ranks
from ..distill.adapters import adapted_modules
from ..distill.launch import check_launch
from ..distill.stages.base import REAL_SCORE, StageConfig
from ..distill.trainable import trainable_names
from ..errors import UsageError, UserError
from ..families.base import noise_channels
from ..families.image import needed_conditions, refuse_last_image
from ..flow import levels_inside
from ..load import Source
from ..load.hub import is_hub_id
from ..mla.bits import is_mixed
from ..mla.window import CausalConfig
from ..recipe.schema import Recipe
from ..registry import stages
from ..run.extent import check_start
from ..run.sample import check_latent_size, check_length, latent_size, read_source, shortest
from ..run.source_video import SourceVideo
from ..run.start import read_start
from .calibration import calibration_reads_negative
from .channels import check_alike, check_channels
from .context import Context
from .rollouts import check_rollouts, read_negative_prompt
from .samples import check_samples
from .steps import Step, steps_of


def check_recipe(recipe: Recipe) -> bool:
    """Check what a run of `recipe` would check, where its source lies here; False where it is on the Hub.

    Raises UserError in one line.
    """
    if not recipe.source.model.startswith("zoo:") and not Path(recipe.source.model).exists():
        if is_hub_id(recipe.source.model):
            return False
        raise UserError(f"source.model: {recipe.source.model} is neither here nor a Hub id (owner/name)")
    for part in [recipe.expert(name) for name in recipe.experts or ()] or [recipe]:
        check_inputs(Context(part, Path(), lambda *told: None), steps_of(part))
    return True


def check_inputs(context: Context, pending: Iterable[Step]) -> None:
    """Refuse what would fail late in the `pending` steps of a run. Raises UserError in one line."""
    pending = list(pending)
    names = {step.name for step in pending}
    if "convert" in names:
        dense = _without_weights(context.source)
        geometry = context.source.family.geometry(dense.config)
        planned_ranks(geometry, dense.rotary_table().axes, context.recipe.convert)
    if "export" in names:
        _check_streaming(context, rolls_out="samples" in names)
    if "samples" in names:
        _check_samples(context)
    # What is done is not asked of this launch.
    trained = {step.stage: context.recipe.distill[step.stage] for step in pending if step.stage is not None}
    _check_stages(context, trained)
    _check_levels(context.recipe)
    negative = any(stage.needs_negative for stage in trained.values())
    negative = negative or ("convert" in names and calibration_reads_negative(context.recipe))
    _check_data(context, "data" in names, any(step.reads_clips for step in pending), negative)


def _check_streaming(context: Context, rolls_out: bool) -> None:
    """What is exported has to stream; kernels that are asked for have to be there."""
    streaming, causal = context.recipe.streaming, context.source.config.get("causal") or {}
    if causal.get("window_frames", 0) is None:
        raise UsageError("causal.window_frames: null has no streaming cache, which an export needs; set a number")
    converted = context.source.family.mla_class
    if streaming.cache != "auto" and not converted.cache_class.fewer_bits:
        raise UsageError(f"streaming.cache: {converted.__name__} keeps its latents in its dtype alone; set auto")
    if streaming.kernels == "triton" and is_mixed(streaming.cache):
        raise UsageError("streaming.kernels: triton reads no latents in 4 bits (streaming.cache); set auto")
    if streaming.kernels == "triton" and streaming.cache != "auto" and context.recipe.convert.own_chunk != "exact":
        raise UsageError("streaming.kernels: triton would read its own chunk quantised (streaming.cache); set auto")
    if streaming.kernels == "triton" and rolls_out:
        reason = importlib.import_module("mla_attention").why_not(context.device, context.dtype)
        if reason is not None:
            raise UsageError(f"streaming.kernels: triton: {reason}; set auto")


def _check_samples(context: Context) -> None:
    generate, config = context.recipe.generate, context.source.config
    causal, height, width = CausalConfig(**(config.get("causal") or {})), *latent_size(config, generate)
    with _named("generate.prompts"):
        check_samples(context.source, generate.prompts)
    with _named("generate.latent_height and latent_width"):
        check_latent_size(config, height, width)
    source = None
    if generate.source is not None:
        with _named("generate.source"):
            source = read_source(generate, config)
            if isinstance(source, SourceVideo):
                source.close()
    with _named("generate.num_frames"):
        check_length(config, shortest(generate.num_frames, source))
    if generate.start is not None:
        with _named("generate.start"):
            channels = noise_channels(config)
            start = read_start(Path(generate.start), channels, height, width)
            size = (channels, height, width)
            check_start(start.unsqueeze(0), causal, generate.num_frames, size, whole_chunks=not generate.hold_start)


def _check_stages(context: Context, pending: Mapping[int, StageConfig]) -> None:
    """The `pending` stages by their index."""
    for index, stage in pending.items():
        check_launch(stage)
        if stage.lora is not None:
            with _named(f"distill.{index}"):
                _check_adapters(stage, _without_weights(context.source))
    scored = any(REAL_SCORE in stages()[stage.stage](stage).networks for stage in pending.values())
    if scored and context.real_score is not None:
        check_alike(context.real_score, context.source)


def _check_levels(recipe: Recipe) -> None:
    """A model of a part of the noise has to know one of the denoising steps that it is trained and measured at."""
    sections: dict[str, Any] = {f"distill.{index}": stage for index, stage in enumerate(recipe.distill)}
    sections |= {"convert.calibration": recipe.convert.calibration, "evaluate": recipe.evaluate}
    for key, section in sections.items():
        if section.noise_levels is not None:
            with _named(key):
                levels_inside(section.noise_levels, recipe.source.noise_range)


def _without_weights(source: Source) -> Any:
    """The dense model on the meta device."""
    with torch.device("meta"):
        return source.family.dense_class.from_config(source.config)


def _check_adapters(stage: StageConfig, model: Any) -> None:
    """The layers outside of what conversion adds are those of the dense `model`."""
    assert stage.lora is not None
    trained = set() if stage.trainable == "latent" else trainable_names(model, stage.trainable)
    adapted_modules(model, stage.lora, trained, stage.adapted_part)


def _check_data(context: Context, made: bool, read: bool, reads_negative: bool) -> None:
    recipe, source = context.recipe, context.source
    if made:
        assert recipe.data.rollouts is not None
        clip = check_rollouts(recipe.data.rollouts, source)
        check_channels(clip, source, "data.rollouts")
        _check_previews(context, clip["latents"].shape[1])
        negative = read_negative_prompt(context, clip["encoder_hidden_states"].unsqueeze(0))
        if negative is None and reads_negative:
            raise UserError("guidance and empty_prompt_rate need a negative prompt; give data.negative_embeds")
    elif read:
        refuse_last_image(source.config)
        example = context.data.example(0)
        check_channels(example, source, "data")
        _check_previews(context, example["latents"].shape[1])
        if reads_negative:
            # Reading it is what tells that it is there.
            _ = context.data.negative


def _check_previews(context: Context, frames: int) -> None:
    """Images are encoded for the `frames` of a clip, and a preview that reads them is no longer."""
    for index, stage in enumerate(context.recipe.distill):
        asked = None if stage.preview is None else stage.preview.num_frames
        if asked is not None and asked > frames and needed_conditions(context.source.config):
            raise UsageError(
                f"distill.{index}.preview.num_frames: images are encoded for the {frames} latent frames of a clip; "
                f"lower {asked} to that"
            )


@contextlib.contextmanager
def _named(key: str) -> Iterator[None]:
    """Puts the key of a recipe before what is wrong with its value."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{key}: {error}") from None
