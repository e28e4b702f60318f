"""Generates the training clips of a data-free run: rollouts of the dense model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from ..distill.data import DataConfig
from ..distill.negative import EMBEDS_KEY, NEGATIVE, find_negative, read_negative
from ..distill.rollouts import RolloutsConfig, open_folder, shards_of, write_rollouts
from ..distill.sharding import from_main
from ..distill.waiting import wait_for_files
from ..errors import UsageError, UserError
from ..families.base import noise_channels
from ..files import atomic_file, save_tensors
from ..load import Source
from ..mla.image import IMAGE
from ..mla.window import causal_of
from ..run.config import GenerateConfig
from ..run.latents import check_length, latent_size
from ..run.sample import rollout
from .context import DATA, Context
from .rollout_prompts import Prompts, read_prompts
from .rollout_texts import digest_of


def roll_out_data(context: Context) -> None:
    """Write the run's clips, except those already stored; every process of a distributed run makes its share."""
    config = context.recipe.data.rollouts
    assert config is not None
    folder, processes, notices = context.path / DATA, PartialState(), context.notices

    def prepare() -> Prompts:
        prompts = read_prompts(context.recipe.data, context.source)
        negative = read_negative_prompt(context, prompts.text[[0]])
        open_folder(folder, _identity(context, prompts, negative))
        if negative is not None:
            with atomic_file(folder / NEGATIVE) as temporary:
                save_tensors({EMBEDS_KEY: negative}, temporary)
        return prompts

    prepared = notices.led("rollouts", context.main, prepare)
    # The other processes do not open the clips of the prompts again.
    index = from_main(None if prepared is None else prepared.index)
    prompts = prepared or read_prompts(context.recipe.data, context.source, index)
    negative = read_negative_prompt(context, prompts.text[[0]])
    teacher = context.dense().to(processes.device)
    context.recipe.streaming.dense.apply(teacher)

    def roll_out(embeds: Tensor, seed: int, conditions: Mapping[str, Tensor]) -> Tensor:
        notices.check()
        negatives = None if negative is None else negative.unsqueeze(0)
        sampling = _sampling(config, seed)
        chunks = rollout(teacher, embeds, sampling, negative_hidden_states=negatives, conditions=conditions)
        return torch.cat([chunk.cpu() for chunk in chunks], dim=2)

    rank, count = processes.process_index, processes.num_processes
    write_rollouts(
        folder,
        config,
        context.recipe.seed,
        prompts.text,
        prompts.captions,
        roll_out,
        context.report,
        rank,
        count,
        lambda chosen: prompts.conditions(chosen, config.num_frames),
    )
    # Another process may have one shard more and still be writing it.
    wait_for_files(shards_of(folder, config), notices)


def read_negative_prompt(context: Context, text: Tensor) -> Tensor | None:
    """The negative prompt `[L, D]` of rollouts, in the shape of the prompts `text` `[N, L, D]`; None if there is none.

    For prompts of the digits teacher it is zeros. Raises UserError if guidance needs one and there is none, or if a
    file does not fit.
    """
    data, config = context.recipe.data, context.recipe.data.rollouts
    assert config is not None
    if config.prompt_embeds is None:
        return torch.zeros_like(text[0])
    path = find_negative(Path(config.prompt_embeds), data.negative_embeds)
    if path is not None:
        return read_negative(path, text.shape[1:])
    if config.guidance_scale != 1:
        raise UserError(
            f"data.rollouts.guidance_scale needs a negative prompt, and {config.prompt_embeds} has no {NEGATIVE}; "
            "encode the prompts again, or give data.negative_embeds"
        )
    return None


def check_rollouts(data: DataConfig, source: Source) -> dict[str, Tensor]:
    """One clip as it will be generated, with its latents on the meta device. Raises UserError if that is impossible."""
    config = data.rollouts
    assert config is not None
    prompts = read_prompts(data, source)
    if causal_of(source.config).window_frames is None:
        raise UsageError("data.kind: rollouts needs a finite window; set causal.window_frames")
    check_length(source.config, config.num_frames)
    height, width = latent_size(source.config, _sampling(config, 0))
    shape = (noise_channels(source.config), config.num_frames, height, width)
    conditions = {name: x[0] for name, x in prompts.conditions([0], config.num_frames).items()}
    if IMAGE in conditions:
        size = conditions[IMAGE].shape[2:]
        if tuple(size) != (height, width):
            raise UsageError(
                f"data.rollouts: the images in {config.prompt_embeds} are {size[0]}x{size[1]} latent pixels, the clips "
                f"would be {height}x{width}; set latent_height: {size[0]} and latent_width: {size[1]}"
            )
    text = prompts.text[[0]][0]
    return {"latents": torch.empty(shape, device="meta"), "encoder_hidden_states": text, **conditions}


def _sampling(config: RolloutsConfig, seed: int) -> GenerateConfig:
    """The sampling settings of the teacher as a GenerateConfig."""
    shared = {key: getattr(config, key) for key in RolloutsConfig.model_fields if key in GenerateConfig.model_fields}
    return GenerateConfig(**{**shared, "prompts": (), "seed": seed})


def _identity(context: Context, prompts: Prompts, negative: Tensor | None) -> str:
    """Digest of everything that the clips depend on."""
    parts: dict[str, Any] = context.recipe.model_dump(mode="json", include={"seed", "source", "causal", "data"})
    for key in ("heldout", "split"):
        parts["data"].pop(key)
    parts["text"] = digest_of(prompts.text, negative)
    parts |= prompts.digests()
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
