"""Writes shards of videos, block by block: first the captions, then the frames, so that one encoder is in memory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ...errors import UserError
from ...mla.image import IMAGE, TOKENS, with_mask
from ..clip_shards import Clip, write_shard
from ..normalization import notes_of
from ..progress import Report
from ..shard_files import read_notes
from .begun import encode_begun
from .config import EncodeConfig
from .frames import (
    EMPTY,
    NO_FILE,
    NOT_OPENED,
    PLACEHOLDER,
    ShortVideo,
    UnusableVideo,
    ahead,
    read_frames,
    require_readable,
    to_pixels,
)
from .models import encode_pixels, has_image_encoder, image_encoder, latents_scale, video_vae
from .plan import WORK
from .sources import Entry, Skipped
from .text import Embeddings, read_ragged, write_embeddings

DECODERS = 4
BLOCK = 1024
"""Videos whose captions are embedded before their frames are encoded; the embeddings wait on disk."""
IN_A_ROW = 50
"""Videos in a row that are missing or cannot be decoded, after which their disk is more likely at fault than they."""

_NOTE = "mla_convert.skipped"


class _Encoder(NamedTuple):
    """Encodes videos to latents, normalized or `raw`; with `images`, also the image conditions of first frames.

    `embed` makes CLIP tokens `[1, L, D]` of an image; it is None if the pipeline has no image encoder.
    """

    vae: Any
    raw: bool
    images: bool
    embed: Callable[[Image.Image], Tensor] | None

    def __call__(self, videos: Sequence[Tensor]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield latents `[C, f, h, w]` and conditions of each video, uint8 `[F, H, W, 3]`; float32 on the CPU."""
        latents = encode_pixels(self.vae, torch.stack([to_pixels(frames) for frames in videos]), self.raw).cpu()
        for frames, one in zip(videos, latents, strict=True):
            yield one, self._conditions(frames[:1], one.shape[1]) if self.images else {}

    def _conditions(self, first: Tensor, frames: int) -> dict[str, Tensor]:
        latents = encode_begun(self.vae, to_pixels(first).unsqueeze(0), frames)[0].cpu()
        conditions = {IMAGE: with_mask(latents)}
        if self.embed is not None:
            conditions[TOKENS] = self.embed(Image.fromarray(first[0].numpy()))[0]
        return conditions


class Shard(NamedTuple):
    """A file to write and the videos planned for it; its first video is number `first` of all."""

    path: Path
    entries: Sequence[Entry]
    first: int

    @property
    def captions(self) -> Path:
        """The temporary file with the embeddings of its captions."""
        return self.path.parent / WORK / self.path.with_suffix(".safetensors").name


def write_video_shards(
    shards: Sequence[Shard],
    texts: Sequence[Embeddings],
    folder: Path,
    config: EncodeConfig,
    device: torch.device,
    report: Report,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Encode `texts` and `shards` with the models of the pipeline in `folder`, loaded once for every `BLOCK` videos.

    `check` is called before each shard and raises UserError if another process has failed.
    Unusable videos are skipped and recorded in the shard's metadata, see `skipped_in`. Raises UserError for a disk that
    fails and after `IN_A_ROW` unusable videos in a row; the shards that these are in are not written, or deleted.
    """
    writing = _Writing(folder, config, device, report, sum(len(shard.entries) for shard in shards), check)
    size = max(1, BLOCK // config.shard_size)
    for start in range(0, max(1, len(shards)), size):
        block = shards[start : start + size]
        waiting = [s for s in block if not s.captions.exists()]
        captions = [Embeddings(s.captions, [entry.caption for entry in s.entries], ragged=True) for s in waiting]
        write_embeddings([*([] if start else texts), *captions], folder, config, device, report, check)
        if block:
            writing.write(block)


class _Writing:
    """Encodes the frames of shards whose captions are embedded, and counts what is done of `total` videos."""

    def __init__(
        self,
        folder: Path,
        config: EncodeConfig,
        device: torch.device,
        report: Report,
        total: int,
        check: Callable[[], None],
    ) -> None:
        self.folder, self.config, self.device, self.report, self.check = folder, config, device, report, check
        self.total, self.done = total, 0
        # Broken videos up to now in a row, and the shards written since the first of them.
        self.in_a_row, self.doubtful = 0, list[Path]()

    def write(self, shards: Sequence[Shard]) -> None:
        """Load the VAE and, if it is needed, the image encoder, and write `shards`."""
        raw, images = self.config.latents == "raw", self.config.image_condition
        with (
            video_vae(self.folder, self.device) as vae,
            image_encoder(self.folder, self.device)
            if images and has_image_encoder(self.folder)
            else contextlib.nullcontext() as embed,
        ):
            encode = _Encoder(vae, raw, images, embed)
            for shard in shards:
                notes = notes_of(latents_scale(self.folder) if raw else None)
                with self._undoing():
                    self.check()
                    write_shard(shard.path, self._clips(shard, encode, notes), shard.first, notes)
                if self.in_a_row:
                    self.doubtful.append(shard.path)
                shard.captions.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _undoing(self) -> Iterator[None]:
        """Delete the doubtful shards if the block fails: their videos may be good, and the disk away since then."""
        try:
            yield
        except BaseException:
            for path in self.doubtful:
                path.unlink(missing_ok=True)
            raise

    def _clips(self, shard: Shard, encode: _Encoder, notes: dict[str, str]) -> Iterator[Clip]:
        """Yield the clips of a shard; at the end, `notes` lists the skipped videos."""
        size = self.config.frames, self.config.height, self.config.width, self.config.fps

        def read(number: int) -> tuple[int, Tensor | UnusableVideo | UserError]:
            try:
                return number, read_frames(shard.entries[number].path, *size)
            except (UnusableVideo, UserError) as error:
                return number, error

        planned = [number for number, entry in enumerate(shard.entries) if not entry.problem]
        skipped = [Skipped(entry.name, entry.problem) for entry in shard.entries if entry.problem]
        self._advance(len(skipped))
        texts, decoded = read_ragged(shard.captions), ahead(read, planned, DECODERS)
        while batch := list(islice(decoded, self.config.batch_size)):
            usable = [(number, found) for number, found in batch if isinstance(found, Tensor)]
            for number, found in batch:
                self._count(shard.entries[number], found)
                if isinstance(found, UnusableVideo):
                    skipped.append(Skipped(shard.entries[number].name, str(found)))
            if usable:
                encoded = encode([frames for _, frames in usable])
                for (number, _), (latents, conditions) in zip(usable, encoded, strict=True):
                    yield _clip(shard.entries[number], latents, conditions, texts[number], self.config)
            self._advance(len(batch))
        if skipped:
            notes[_NOTE] = json.dumps(sorted(skipped))

    def _count(self, entry: Entry, found: Tensor | UnusableVideo | UserError) -> None:
        """Raise UserError for a disk that fails, and at the last of `IN_A_ROW` videos that are missing or broken."""
        if isinstance(found, UserError):
            raise found
        if not isinstance(found, UnusableVideo) or isinstance(found, ShortVideo):
            self.in_a_row, self.doubtful = 0, []
            return
        self.in_a_row += 1
        if self.in_a_row >= IN_A_ROW:
            remedy = PLACEHOLDER.format(disk="their disk", place="the place of each")
            raise UserError(
                f"{IN_A_ROW} videos in a row cannot be used, the last is {entry.name}: {found}; {remedy}, and continue "
                "with --resume"
            )

    def _advance(self, count: int) -> None:
        self.done += count
        if count:
            self.report("videos", self.done, self.total)


def skipped_in(path: Path) -> list[Skipped]:
    """The videos planned for a shard that were skipped. Raises UserError if the shard cannot be read."""
    return [Skipped(*row) for row in json.loads(read_notes(path).get(_NOTE, "[]"))]


def came_back(shard: Shard) -> bool:
    """Whether a written shard lacks a video whose file could not be read and can be now. Raises UserError."""
    missing = {name for name, reason in skipped_in(shard.path) if reason.startswith((NO_FILE, EMPTY, NOT_OPENED))}
    return any(entry.name in missing and not entry.problem and _opens(entry.path) for entry in shard.entries)


def _opens(path: Path) -> bool:
    try:
        require_readable(path)
    except UnusableVideo:
        return False
    return True


def _clip(entry: Entry, latents: Tensor, conditions: Mapping[str, Tensor], text: Tensor, config: EncodeConfig) -> Clip:
    return Clip(
        latents.to(config.torch_dtype),
        text,
        name=entry.name,
        caption=entry.caption,
        width=config.width,
        height=config.height,
        fps=config.fps,
        duration_sec=config.frames / config.fps,
        conditions={name: x.to(config.torch_dtype) for name, x in conditions.items()},
    )
