"""Computes what the stages of a recipe need (`distill --dry-run`): memory, steps, tokens and time; trains nothing."""

from __future__ import annotations

import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from .. import registry
from ..distill.data import open_data
from ..distill.footprint import ClipShape, Footprint, Launch, footprint
from ..distill.shard_index import shard_names
from ..distill.stages.base import REAL_SCORE, TEACHER, StageConfig
from ..distill.trainer import run_stage
from ..errors import UsageError, UserError
from ..families.base import Family, noise_channels
from ..families.image import needed_conditions, refuse_last_image
from ..load import accepted_config, known_config
from ..recipe.schema import Recipe, SourceConfig
from ..registry import stage_of
from ..run.config import GenerateConfig
from ..run.latents import DIGITS, latent_scale, latent_size, prompt_encoder
from ..run.reencode import image_latent
from .shapes import NoiseClips, dense_of, student_of
from .sources import source_of
from .vae import check_source_vae, reencoding_bytes

WAN_1_3B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
# Differences from diffusers' default configuration, by a part of a published model's name.
PUBLISHED: dict[str, dict[str, Any]] = {
    "wan2.1-t2v-1.3b": WAN_1_3B,
    "wan2.1-t2v-14b": {},
    "self-forcing": WAN_1_3B,
    "causal-forcing": WAN_1_3B,
    "longlive-1.3b": WAN_1_3B,
}
DIGITS_TEXT, WAN_TEXT, WAN_FRAMES, WAN_CHANNELS = 3, 512, 21, 16


class DryRun:
    """Builds the models of a recipe on the meta device and finds the shape of a clip; reads shapes, no weights.

    Raises UserError in one line if the source's configuration cannot be determined.
    """

    def __init__(self, recipe: Recipe, launch: Launch) -> None:
        if not recipe.distill:
            raise UsageError(f"recipe {recipe.name} has no distill stages")
        self.recipe, self.launch = recipe, launch
        self.assumptions: list[str] = []
        self._source_is_here = True
        self.family, self.config = self._shapes(recipe.source)
        refuse_last_image(self.config)
        self.clip = self._clip()

    def _shapes(self, section: SourceConfig) -> tuple[Family, dict[str, Any]]:
        causal = self.recipe.causal
        try:
            source = source_of(section, causal)
            return source.family, source.config
        except UserError as error:
            family, config = self._published(section, error)
            if section is self.recipe.source:
                self._source_is_here = False
        if causal is not None:
            config["causal"] = causal.model_dump(mode="json")
        return family, config

    def _published(self, section: SourceConfig, error: UserError) -> tuple[Family, dict[str, Any]]:
        """Family and configuration of a source whose weights are not on this machine. Raises UserError."""
        folder = Path(section.model) / (section.subfolder or "")
        if (folder / "config.json").is_file():
            stored = known_config(folder)
            for family in registry.families().values():
                if stored.get("_class_name") in family.source_classes:
                    self.assumptions.append(f"shapes are those of {folder / 'config.json'}; its weights are missing")
                    return family, accepted_config(family.dense_class, stored)
        for name, changes in PUBLISHED.items():
            if name in section.model.lower():
                self.assumptions.append(
                    f"shapes are those of the published {name}; its weights are not on this machine"
                )
                family = registry.families()["wan"]
                return family, accepted_config(family.dense_class, changes)
        raise UserError(f"the shapes of {section.model} are unknown without its files: {error}") from None

    def _clip(self) -> ClipShape:
        data, rollouts = self.recipe.data, self.recipe.data.rollouts
        channels, text_dim = noise_channels(self.config), self.config.get("text_dim", 4096)
        if rollouts is not None:
            sizes = {"latent_height": rollouts.latent_height, "latent_width": rollouts.latent_width}
            height, width = latent_size(self.config, GenerateConfig(**sizes))
            text = DIGITS_TEXT if prompt_encoder(self.config) == DIGITS else WAN_TEXT
            return ClipShape(channels, rollouts.num_frames, height, width, text, text_dim)
        if data.kind == "latents" and not shard_names(Path(data.folder or "")):
            clip = ClipShape(channels, WAN_FRAMES, *latent_size(self.config, GenerateConfig()), WAN_TEXT, text_dim)
            shape = [clip.channels, clip.frames, clip.height, clip.width]
            self.assumptions.append(f"clips are {shape} with {WAN_TEXT} text tokens; {data.folder} has none")
            return clip
        example = open_data(data, self.recipe.seed, needed_conditions(self.config)).example(0)
        return ClipShape(*example["latents"].shape, *example["encoder_hidden_states"].shape)

    def models(self, device: str = "meta") -> tuple[Any, dict[str, Any]]:
        """The student and, by name, the frozen networks, with random weights; the latter in the recipe's dtypes."""
        frozen = {TEACHER: (self.recipe.source, self.family, self.config)}
        if self.recipe.real_score is not None:
            frozen[REAL_SCORE] = (self.recipe.real_score, *self._shapes(self.recipe.real_score))
        networks = {}
        for name, (section, family, config) in frozen.items():
            networks[name] = dense_of(family, config, device)
            for parameter in networks[name].parameters():
                parameter.data = parameter.data.to(getattr(torch, section.dtype))
        student = student_of(self.family, self.config, networks[TEACHER], self.recipe.convert, device)
        return student, networks

    def needs(self) -> list[Footprint]:
        """Memory, steps and tokens of each stage."""
        student, networks = self.models()
        configs = [config.over(self.launch.processes) for config in self.recipe.distill]
        return [
            footprint(stage_of(config), student, networks, self.launch, self.clip, self._reencoding(config))
            for config in configs
        ]

    def _reencoding(self, config: StageConfig) -> int:
        if not config.reencodes or self.vae is None:
            return 0
        return reencoding_bytes(self.vae, self.clip.height, self.clip.width)

    @functools.cached_property
    def vae(self) -> dict[str, Any] | None:
        """The configuration of the source's VAE, of Wan2.1's if that fits and the files are not here, else None."""
        source = self.recipe.source
        # Of a source that is on another machine, so is the VAE. A model that makes pixels is refused anyway.
        if self._source_is_here or latent_scale(self.config).spatial == 1:
            found = check_source_vae(self.config, source.model, source.components)
            if found is not None:
                return found
        wan21 = noise_channels(self.config) == WAN_CHANNELS
        what = "is Wan2.1's" if wan21 else "is not counted, nor is encoding timed"
        self.assumptions.append(f"the VAE {what}; the source's is not on this machine")
        return {} if wan21 else None

    def measure(self, steps: int) -> list[float]:
        """Seconds per step of each stage in this process, the median of `steps`, with random weights and clips."""
        seconds = []
        for index, config in enumerate(self.recipe.distill):
            student, networks = self.models("cpu")
            student.noise_range = self.recipe.source.noise_range
            # Two extra steps: the first includes setup, the last is followed by a checkpoint.
            changes = {"steps": steps + 2, "warmup_steps": 0, "stop": None, "preview": None, "tracker": None}
            changes |= {"checkpoint_every": None, "checkpoint_minutes": None, "eval_every": None}
            second = stage_of(config).second
            if second is not None and second.continues:
                config = config.model_copy(update={second.name: TEACHER})
            # Accumulate gradients as often as one process of the launch does.
            short = config.over(self.launch.processes).model_copy(update=changes | {"global_batch": None})
            moments: list[float] = []

            def progress(what: str, done: int, total: int, detail: str = "", moments: list[float] = moments) -> None:
                if done:
                    moments.append(time.monotonic())

            data = NoiseClips(self.clip, self.config)
            encode = None
            if config.reencodes and self.vae is not None:
                encode = functools.partial(image_latent, AutoencoderKLWan.from_config(self.vae).eval())
            elif config.reencodes:
                short = short.model_copy(update={"reencode_first": False})
            with tempfile.TemporaryDirectory() as folder:
                where = (Path(folder), 0, index + 1)
                run_stage(short, student, networks, data, None, *where, progress, image_latent=encode)
            seconds.append(statistics.median(b - a for a, b in itertools.pairwise(moments[:-1])))
        return seconds


def read_launch(config_file: Path | None, processes: int) -> Launch:
    """Read the launch from an Accelerate configuration; None means DDP in `processes`. Raises UsageError."""
    if config_file is None:
        return Launch(processes)
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        found = load_config_from_file(str(config_file))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"cannot read the Accelerate configuration {config_file}: {error}") from None
    kind = str(getattr(found.distributed_type, "value", found.distributed_type))
    return Launch(found.num_processes, kind == "FSDP", kind == "DEEPSPEED")


def dry_run(recipe: Recipe, launch: Launch, measure: int = 0) -> dict[str, Any]:
    """Compute what `distill --dry-run --json` prints; docs/distill.md describes the keys."""
    run = DryRun(recipe, launch)
    needs: list[Mapping[str, Any]] = [need.model_dump(mode="json") for need in run.needs()]
    seconds = run.measure(measure) if measure else [None] * len(needs)
    rows = [
        {**need, "seconds_per_step": second, "seconds": None if second is None else second * need["steps"]}
        for need, second in zip(needs, seconds, strict=True)
    ]
    return {
        "recipe": recipe.name,
        "launch": vars(launch),
        "clip": vars(run.clip),
        "stages": rows,
        "memory_bytes": max(row["memory_bytes"] for row in rows),
        "seconds": None if not measure else sum(row["seconds"] for row in rows),
        "assumptions": run.assumptions,
    }
