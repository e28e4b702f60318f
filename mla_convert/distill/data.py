"""Provides training clips by index: generated digits, or latents and text embeddings from disk."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.utils.data import default_collate

from ..draws import Use, drawn
from ..errors import UserError
from ..zoo.digits.data import CLIP_FRAMES, sample_batch
from .identity import Identity
from .latents import LatentShards
from .negative import NEGATIVE, find_negative, read_negative
from .normalization import Latents
from .rollouts import RolloutsConfig
from .shard_index import ShardIndex, index_shards

Batch = dict[str, Tensor]
Split = Literal["drawn", "last"]


class DataConfig(BaseModel):
    """Where clips come from.

    - `kind: digits` generates clips without end. `latents` reads a `folder` of parquet shards in FastVideo's
      text-to-video schema; text embeddings of different lengths are zero-padded to `text_tokens`. `rollouts` are
      latents that the dense model makes at the beginning of a run, in the run's folder.
    - `heldout` is the number of clips that are set aside and never trained on. For digits, they are held-out
      handwriting with held-out prompts.
    - `split: drawn` draws the held-out clips of the other kinds by the recipe's seed, and separately those to calibrate
      on, because clips with neighboring names are often cuts of one film. `last` keeps the order of names and holds out
      the last clips.
    - `latents` says what the latents of a folder are: `normalized`, as a transformer takes them, or `raw`, as
      FastVideo's preprocessing stores the VAE's output. Raw latents are normalized with the statistics of the VAE,
      taken from a shard's metadata or, for Wan's VAEs, from the number of channels. `auto` uses the shards' metadata,
      which `mla-convert encode` writes; without metadata it refuses latents whose statistics look raw.
    - `skip` names clips of a folder that are not read: by number (in the order of names, from 0), `file_name` or `id`,
      or all of a shard by its path in the folder. In training, the next clip that is not skipped replaces each of
      them. So a run that a damaged clip has ended can continue with `--resume` in the same order.
    - `negative_embeds` is a .safetensors file with the negative prompt, `prompt_embeds` `[L, D]`: guidance steers away
      from it, and clips that lose their own prompt get it. The default is `negative.safetensors` beside the clips or
      the prompts, which `mla-convert encode` writes. For digits it is zeros.

    With `rollouts`, `text_tokens` and `latents` are about the folder of clips that `prompt_embeds` names, if it does.

    A model that is conditioned on an image reads what `mla-convert encode --image-condition` stores of the clips.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["digits", "latents", "rollouts"] = "digits"
    folder: str | None = None
    text_tokens: int | None = Field(None, ge=1)
    latents: Latents = "auto"
    skip: tuple[int | str, ...] = ()
    negative_embeds: str | None = None
    heldout: int = Field(128, ge=1)
    split: Split = "drawn"
    rollouts: RolloutsConfig | None = None

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> DataConfig:
        if self.kind == "latents" and self.folder is None:
            raise ValueError("kind latents needs folder; set it to the folder of parquet shards")
        prompted = self.rollouts is not None and self.rollouts.prompt_embeds is not None
        if self.kind != "latents" and not prompted and self.latents != "auto":
            raise ValueError(f"latents describes the shards of a folder, and kind {self.kind} reads none; leave it out")
        if self.kind != "latents" and self.skip:
            raise ValueError(f"skip names clips of a folder, and kind {self.kind} reads none; leave it out")
        if self.kind == "digits" and self.split != "drawn":
            raise ValueError("split chooses among the clips of a folder, and digits are generated; leave it out")
        if self.kind == "digits" and not (self.folder is self.text_tokens is self.negative_embeds is None):
            raise ValueError("kind digits is generated; leave out folder, text_tokens and negative_embeds")
        if (self.kind == "rollouts") != (self.rollouts is not None):
            raise ValueError("kind rollouts and the section rollouts go together; set both or neither")
        if self.rollouts is not None:
            if self.folder is not None:
                raise ValueError("kind rollouts writes its clips to the run's folder; leave out folder")
            if self.text_tokens is not None and not prompted:
                raise ValueError("text_tokens pads the prompts of clips in rollouts.prompt_embeds; leave it out")
            if self.heldout >= self.rollouts.clips:
                raise ValueError(
                    f"heldout: {self.heldout} leaves none of {self.rollouts.clips} rollouts to train on; lower heldout"
                )
        return self

    def made_in(self, folder: Path) -> DataConfig:
        """For rollouts, the configuration that reads them from `folder` as latents; other kinds are unchanged."""
        if self.kind != "rollouts":
            return self
        return DataConfig(
            kind="latents", folder=str(folder), heldout=self.heldout, split=self.split, latents="normalized"
        )


class Data(Protocol):
    """Clips addressed by index; the same index gives the same bytes in every process.

    An example holds float32 `latents` `[C, F, H, W]` and `encoder_hidden_states` `[L, D]`, plus any image conditions
    of the model, keyed by its argument names. `size` is the number of training
    examples and `identity` identifies the set of clips; both are None for an endless supply. `negative` `[L, D]`,
    float32, is the negative prompt; reading it raises UserError if there is none.
    """

    size: int | None
    identity: Identity | None

    @property
    def negative(self) -> Tensor: ...

    def example(self, index: int) -> Batch: ...

    def heldout(self, count: int | None = None) -> Batch:
        """The first `count` held-out clips (all when None), stacked; the same ones at every call."""
        ...


class DigitClips:
    """Clips of bouncing digits; clip `index` depends only on (seed, index)."""

    size: int | None = None
    identity: Identity | None = None

    def __init__(self, seed: int, heldout: int = 128) -> None:
        self.seed, self.heldout_clips = seed, heldout

    @property
    def negative(self) -> Tensor:
        return torch.zeros_like(self.example(0)["encoder_hidden_states"])

    def example(self, index: int) -> Batch:
        """`latents` `[1, 16, 16, 16]` and `encoder_hidden_states` `[3, 32]`."""
        clip = sample_batch(1, CLIP_FRAMES, np.random.default_rng((self.seed, index)))
        return {"latents": clip.videos[0], "encoder_hidden_states": clip.embeddings[0]}

    def heldout(self, count: int | None = None) -> Batch:
        clips = sample_batch(self.heldout_clips, CLIP_FRAMES, np.random.default_rng(1), "heldout", "heldout")
        return {"latents": clips.videos[:count], "encoder_hidden_states": clips.embeddings[:count]}


class LatentClips:
    """The clips of a folder of shards; the last `heldout` of their `rows` are set aside.

    `rows` are the numbers of all clips in some order, by default that of the shards. Clips in `skip`, by
    number, name or shard, are not read. Held-out ones are dropped; in training, the next clip replaces each of them,
    so that every other example stays the same. The negative prompt comes from `negative_embeds`, or from the file
    beside the shards. Raises UserError if nothing is left.
    """

    def __init__(
        self,
        shards: LatentShards,
        heldout: int,
        negative_embeds: str | None = None,
        skip: Sequence[int | str] = (),
        rows: Sequence[int] | None = None,
    ) -> None:
        self.shards, self.negative_embeds = shards, negative_embeds
        size = shards.split(heldout)
        self.size: int | None = size
        self.identity: Identity | None = shards.identity
        skipped = _skipped(shards, skip)
        rows = range(len(shards)) if rows is None else rows
        self._heldout = [row for row in rows[size:] if row not in skipped]
        kept = [place for place in range(size) if rows[place] not in skipped] if skipped else range(size)
        if not kept or not self._heldout:
            raise UserError(f"data.skip leaves no clips to {'hold out' if kept else 'train on'}; skip fewer")
        # The next clip that is kept; after the last one, the first.
        self._train = [rows[kept[bisect.bisect_left(kept, place) % len(kept)]] for place in range(size)]

    @functools.cached_property
    def negative(self) -> Tensor:
        path = find_negative(self.shards.folder, self.negative_embeds)
        if path is None:
            raise UserError(
                f"guidance and empty_prompt_rate need a negative prompt, and {self.shards.folder} has no {NEGATIVE}; "
                "write one with `mla-convert encode --prompts` and set data.negative_embeds"
            )
        return read_negative(path, self.example(0)["encoder_hidden_states"].shape)

    def example(self, index: int) -> Batch:
        return self.shards.read(self._train[index])

    def heldout(self, count: int | None = None) -> Batch:
        batch: Batch = default_collate([self.shards.read(row) for row in self._heldout[:count]])
        return batch

    def heldout_prompts(self, count: int) -> list[str]:
        """The captions of the first `count` held-out clips, "" if the shards have none."""
        return [self.shards.caption(row) for row in self._heldout[:count]]


def drawn_rows(count: int, seed: int) -> list[int]:
    """The numbers of `count` clips in an order that `seed` shuffles."""
    order: list[int] = torch.randperm(count, generator=drawn(Use.SPLIT, seed)).tolist()
    return order


def _skipped(shards: LatentShards, skip: Sequence[int | str]) -> set[int]:
    """The numbers of the clips that `skip` names. Raises UserError for one that does not exist."""
    if not skip:
        return set()
    by_name = shards.numbers({name for name in skip if isinstance(name, str)})
    unread = {shard.name for shard in shards.index.shards if not shard.clips}
    for entry in skip:
        if entry not in range(len(shards)) and not by_name.get(str(entry)) and entry not in unread:
            raise UserError(f"data.skip: {shards.folder} has no clip {entry!r}; it has {len(shards)}, counted from 0")
    return {entry for entry in skip if isinstance(entry, int)}.union(*by_name.values())


def without_worker_traceback(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches of a loader; a worker's UserError loses the traceback that the loader puts in its message."""
    try:
        yield from batches
    except UserError as error:
        *traceback, last = str(error).strip().splitlines()
        raise type(error)(last.partition(": ")[2] if traceback else last) from None


def open_data(
    config: DataConfig,
    seed: int,
    conditions: Collection[str] = (),
    known: ShardIndex | None = None,
    checked: bool = False,
    skippable: bool = True,
) -> Data:
    """Open the clips that `config` names; `seed` is the recipe's. Raises UserError if they cannot be trained on.

    `conditions` names the model's conditions other than text, which every clip must hold. `known` is an older index
    of the folder, of which only what has changed is read; one that is `checked` is used as it is.
    Messages name data.skip as a remedy only if clips are `skippable`.
    """
    if config.kind == "digits":
        if conditions:
            raise UserError("the model is conditioned on an image, and data.kind: digits has none; set kind: latents")
        return DigitClips(seed, config.heldout)
    if config.folder is None:
        raise UserError("kind rollouts: its clips are written by a run; use kind: latents with that folder instead")
    index = known
    if index is None or not checked:
        skipped = {name for name in config.skip if isinstance(name, str)}
        index = index_shards(Path(config.folder), known, skipped, skippable)
    shards = LatentShards(config.folder, config.text_tokens, config.latents, conditions, index, checked, skippable)
    rows = drawn_rows(len(shards), seed) if config.split == "drawn" else None
    return LatentClips(shards, config.heldout, config.negative_embeds, config.skip, rows)
