"""Writes training clips that the dense teacher generates from prompts: training without collected data.

A student should learn what its teacher generates in many guided steps, so no videos have to be
collected (Self Forcing, arXiv 2506.08009, and DMD2, arXiv 2405.14867, also train without videos). The clips are
written once, as shards that are read like any others.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from ..draws import Use, drawn_seed
from ..dtypes import full_name
from ..errors import UserError
from ..files import write_json
from ..finite import all_finite
from ..sampling import SamplingConfig
from .clip_shards import Clip, shard_name, write_shard
from .normalization import KIND_NOTE
from .progress import Report

PLAN = "rollouts.json"


class Texts(Protocol):
    """The embeddings of N prompts, such as a tensor `[N, L, D]`; `texts[rows]` are those of some, `[n, L, D]`."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: list[int], /) -> Tensor: ...


class Captions(Protocol):
    """The captions of prompts by number."""

    def __getitem__(self, row: int, /) -> str: ...


RollOut = Callable[[Tensor, int, Mapping[str, Tensor]], Tensor]


class RolloutsConfig(SamplingConfig):
    """How the dense model makes the clips that are trained on.

    `clips` clips of `num_frames` latent frames, including the held-out ones, are rolled out chunk by chunk with the
    cache. `batch_size` of them are made at once and stored in one file. They take the prompts in turn, each with its
    own noise.

    Prompts are `prompts`, which the embedded digits teacher reads, or `prompt_embeds`: a .safetensors file with
    `prompt_embeds` `[N, L, D]`, or a folder of them, as `mla-convert encode --prompts` writes. It may also name a
    folder of clips, whose captions are used, and whose images if the model is conditioned on one.

    The sampling keys are those of `generate`; a few-step teacher needs its own `sampler` and `denoising_steps`.
    `latent_height` and `latent_width` are needed where the model does not fix them. `dtype` is the type of the stored
    latents.
    """

    clips: int = Field(ge=2)
    num_frames: int = Field(21, ge=1)
    batch_size: int = Field(8, ge=1)
    prompts: tuple[str, ...] = ()
    prompt_embeds: str | None = None
    num_inference_steps: int = Field(48, ge=1)
    latent_height: int | None = Field(None, ge=1)
    latent_width: int | None = Field(None, ge=1)
    dtype: Annotated[Literal["float32", "bfloat16"], BeforeValidator(full_name)] = "float32"

    @model_validator(mode="after")
    def _one_source_of_prompts(self) -> RolloutsConfig:
        if bool(self.prompts) == (self.prompt_embeds is not None):
            raise ValueError("rollouts need either prompts or prompt_embeds; set exactly one of them")
        return self


def open_folder(folder: Path, identity: str) -> None:
    """Prepare `folder` for the rollouts with this `identity`; delete rollouts with another identity from it."""
    plan = folder / PLAN
    if plan.is_file():
        recorded = json.loads(plan.read_text(encoding="utf-8"))
        if recorded.get("identity") == identity:
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink()
            return
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(plan, {"identity": identity})


def shards_of(folder: Path, config: RolloutsConfig) -> list[Path]:
    """The paths of the shards of all clips."""
    return [folder / shard_name(number) for number in range(math.ceil(config.clips / config.batch_size))]


def write_rollouts(
    folder: Path,
    config: RolloutsConfig,
    seed: int,
    text: Texts,
    captions: Captions,
    roll_out: RollOut,
    report: Report,
    process: int = 0,
    processes: int = 1,
    conditions: Callable[[Sequence[int]], Mapping[str, Tensor]] = lambda chosen: {},
) -> None:
    """Write the missing shards of `folder`: every `processes`-th, starting at number `process`.

    Clip i takes prompt i modulo N of `text` and `captions`, which are read shard by shard. `conditions` returns the
    image conditions `[B, ...]` of prompts by number; they are written beside the latents. `roll_out` returns latents
    `[B, C, F, H, W]` for texts `[B, L, D]`, a seed and these conditions. The seed depends only on `seed` and the
    shard's number, so an interrupted folder ends with the same bytes, with any number of processes.
    Raises UserError for latents that are not finite.
    """
    starts, paths = range(0, config.clips, config.batch_size), shards_of(folder, config)
    mine = range(process, len(starts), processes)
    for done, number in enumerate(mine):
        path = paths[number]
        if not path.is_file():
            rows = range(starts[number], min(starts[number] + config.batch_size, config.clips))
            chosen = [row % len(text) for row in rows]
            chosen_conditions, dtype = conditions(chosen), getattr(torch, config.dtype)
            embeds = text[chosen]
            latents = roll_out(embeds, drawn_seed(Use.ROLLOUT, seed, number), chosen_conditions).to(dtype)
            if not all_finite(latents):
                raise UserError(
                    f"the teacher's rollout for {path.name} has NaN or infinite values; check the source and the "
                    "sampling keys of data.rollouts"
                )
            clips = []
            for i, row in enumerate(chosen):
                own = {name: x[i].to(dtype) for name, x in chosen_conditions.items()}
                clips.append(Clip(latents[i], embeds[i], caption=captions[row], conditions=own))
            write_shard(path, clips, starts[number], {KIND_NOTE: "normalized"})
        report("roll out clips", done + 1, len(mine))
