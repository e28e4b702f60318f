"""Checks a run before it writes anything, so that what would fail hours later fails at once."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ..convert.limits import planned_ranks
from ..distill.adapters import adapted_modules
from ..distill.data import Data
from ..distill.footprint import ClipShape
from ..distill.launch import check_launch
from ..distill.needs import check_needs
from ..distill.stages.base import REAL_SCORE, TEACHER, StageConfig
from ..distill.trainable import trainable_names
from ..errors import UsageError, UserError
from ..families.base import attention_geometry, noise_channels
from ..families.image import needed_conditions, refuse_last_image
from ..flow import levels_inside
from ..mla.window import causal_of
from ..recipe.schema import Recipe
from ..registry import stage_of
from ..run.extent import check_start
from ..run.latents import check_latent_size, check_length, latent_size
from ..run.sample import read_source
from ..run.source import shortest
from ..run.source_video import SourceVideo
from ..run.start import read_start
from .calibration import calibration_reads_negative
from .channels import check_alike, check_channels
from .context import Context
from .remote import check_beside_source, is_here, taken_from_hub
from .rollouts import check_rollouts, read_negative_prompt
from .rundir import require_clips
from .samples import check_samples
from .shapes import NoiseClips, dense_of, student_of
from .steps import Step, steps_of
from .vae import check_source_vae

logger = logging.getLogger(__name__)

SMALL_FOR_ADAFACTOR = 1e-4
"""Learning rates below this hardly move a model with Adafactor, whose rates are relative to the weights."""


class Checked(NamedTuple):
    """Whether the source was checked, the names that were `taken_from_hub`, and the size of the samples' latents."""

    source: bool
    unchecked: list[str]
    size: tuple[int, int] | None


def check_recipe(recipe: Recipe) -> Checked:
    """Run the checks of a whole run; where the source is not on this machine, those that do without it.

    Raises UserError in one line.
    """
    _warn_of_rates(recipe.distill)
    unchecked = taken_from_hub(recipe)
    if not is_here(recipe.source.model):
        return Checked(False, unchecked, check_beside_source(recipe))
    size = None
    for part in [recipe.expert(name) for name in recipe.experts or ()] or [recipe]:
        context = Context(part, Path(), lambda *args: None)
        check_inputs(context, steps_of(part))
        size = latent_size(context.source.config, context.generate)
    return Checked(True, unchecked, size)


def check_inputs(context: Context, pending: Iterable[Step], finished: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Check everything that could fail late in the `pending` steps of a run. Raises UserError in one line.

    `finished` is what the run has recorded of its finished steps.
    """
    pending = list(pending)
    names = {step.name for step in pending}
    if "convert" in names:
        dense = dense_of(context.source.family, context.source.config)
        planned_ranks(attention_geometry(dense.config), dense.rotary_table().axes, context.recipe.convert)
    if "export" in names:
        _check_streaming(context, makes_samples="samples" in names)
    if "samples" in names:
        _check_samples(context)
    # The launch only has to fit the stages that are still to be trained.
    trained = {step.stage: context.recipe.distill[step.stage] for step in pending if step.stage is not None}
    _check_stages(context, trained)
    _check_levels(context.recipe)
    negative = any(stage.needs_negative for stage in trained.values())
    negative = negative or ("convert" in names and calibration_reads_negative(context.recipe))
    data = _check_data(context, "data" in names, any(step.reads_clips for step in pending), negative)
    if data is None:
        return
    if "data" not in names:
        require_clips(context.path, finished, data.identity)
    _check_needs(context, list(trained.values()), data)


def _check_streaming(context: Context, makes_samples: bool) -> None:
    """Check that the exported model can stream, with the `streaming` section's cache and kernels."""
    streaming = context.recipe.streaming
    if causal_of(context.source.config).window_frames is None:
        raise UsageError("causal.window_frames: null has no streaming cache, which an export needs; set a number")
    converted = context.source.family.mla_class
    if streaming.cache != "auto" and not converted.cache_class.fewer_bits:
        raise UsageError(f"streaming.cache: {converted.__name__} stores latents only in its own dtype; set auto")
    if streaming.kernels == "triton" and streaming.cache != "auto" and context.recipe.convert.own_chunk != "exact":
        raise UsageError(
            "streaming.kernels: with own_chunk: latent, triton would read its own chunk quantized (streaming.cache); "
            "set auto"
        )
    if streaming.kernels == "triton" and makes_samples:
        reason = importlib.import_module("mla_attention").why_not(context.device, context.dtype)
        if reason is not None:
            raise UsageError(f"streaming.kernels: triton: {reason}; set auto")


def _check_samples(context: Context) -> None:
    generate, config = context.generate, context.source.config
    causal, height, width = causal_of(config), *latent_size(config, generate)
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
    """Check the launch and the adapters of the `pending` stages, given by index."""
    source = context.source
    _warn_of_rates(pending.values())
    for index, stage in pending.items():
        check_launch(stage)
        if stage.reencodes:
            with _named(f"distill.{index}"):
                check_source_vae(source.config, source.origin, source.components)
        if stage.lora is not None:
            with _named(f"distill.{index}"):
                _check_adapters(stage, dense_of(source.family, source.config))


def _warn_of_rates(stages: Iterable[StageConfig]) -> None:
    """Warn of learning rates that are AdamW's and not Adafactor's."""
    for config in stages:
        if config.optimizer == "adafactor":
            second = stage_of(config).second
            rates = {"": config.learning_rate}
            if second is not None:
                rates[f" of the {second.name}"] = second.learning_rate
            for name, rate in rates.items():
                if rate < SMALL_FOR_ADAFACTOR:
                    _warn_of_rate(config.stage, name, rate)


@functools.cache
def _warn_of_rate(stage: str, name: str, rate: float) -> None:
    logger.warning(
        "stage %s: Adafactor's learning rate is a share of each tensor's size, so the rate%s, %g, hardly moves the "
        "model; raise it above %g or set optimizer: adamw",
        stage,
        name,
        rate,
        SMALL_FOR_ADAFACTOR,
    )


def _check_needs(context: Context, stages: Sequence[StageConfig], data: Data) -> None:
    """Check that `stages` have what they need, with models of the right shapes in place of the run's own."""
    if not stages:
        return
    source = context.source
    networks = {TEACHER: dense_of(source.family, source.config)}
    student = student_of(source.family, source.config, networks[TEACHER], context.recipe.convert)
    student.noise_range = context.recipe.source.noise_range
    for stage in map(stage_of, stages):
        if REAL_SCORE in stage.frozen and context.real_score is not None:
            check_alike(context.real_score, source)
            networks[REAL_SCORE] = dense_of(context.real_score.family, context.real_score.config)
        check_needs(stage, student, networks, data)


def _check_levels(recipe: Recipe) -> None:
    """Check that a model for part of the noise range is trained and measured at a level inside that range."""
    sections: dict[str, Any] = {f"distill.{index}": stage for index, stage in enumerate(recipe.distill)}
    sections |= {"convert.calibration": recipe.convert.calibration, "evaluate": recipe.evaluate}
    for key, section in sections.items():
        if section.noise_levels is not None:
            with _named(key):
                levels_inside(section.noise_levels, recipe.source.noise_range)


def _check_adapters(stage: StageConfig, model: Any) -> None:
    """Check a stage's LoRA adapters on the dense `model`, which shares all layers that conversion does not add."""
    assert stage.lora is not None
    trained = set() if stage.trainable == "latent" else trainable_names(model, stage.trainable)
    adapted_modules(model, stage.lora, trained, stage.adapted_part)


def _check_data(context: Context, generates_clips: bool, reads_clips: bool, reads_negative: bool) -> Data | None:
    """Check the training clips, which a data-free run still has to generate, and the negative prompt.

    Returns the clips, or noise in the shape of those to be generated; None if none are read.
    """
    recipe, source = context.recipe, context.source
    if generates_clips:
        assert recipe.data.rollouts is not None
        clip = check_rollouts(recipe.data, source)
        check_channels(clip, source, "data.rollouts")
        _check_previews(context, clip["latents"].shape[1])
        negative = read_negative_prompt(context, clip["encoder_hidden_states"].unsqueeze(0))
        if negative is None and reads_negative:
            raise UserError("guidance and empty_prompt_rate need a negative prompt; give data.negative_embeds")
        shape = ClipShape(*clip["latents"].shape, *clip["encoder_hidden_states"].shape)
        return NoiseClips(shape, source.config, recipe.data.rollouts.clips - recipe.data.heldout)
    elif reads_clips:
        refuse_last_image(source.config)
        example = context.data.example(0)
        check_channels(example, source, "data")
        _check_previews(context, example["latents"].shape[1])
        if reads_negative:
            # Reading it raises UserError if there is none.
            _ = context.data.negative
        return context.data
    return None


def _check_previews(context: Context, frames: int) -> None:
    """Check that no preview of an image-to-video model is longer than a clip, whose image covers `frames` frames."""
    for index, stage in enumerate(context.recipe.distill):
        length = None if stage.preview is None else stage.preview.num_frames
        if length is not None and length > frames and needed_conditions(context.source.config):
            raise UsageError(
                f"distill.{index}.preview.num_frames: images are encoded for the {frames} latent frames of a clip; "
                f"lower {length} to that"
            )


@contextlib.contextmanager
def _named(key: str) -> Iterator[None]:
    """Prefix the UserErrors of the block with a recipe key."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{key}: {error}") from None
