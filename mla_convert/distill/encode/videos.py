"""Writes shards of videos: first all captions, then all frames, so that the text encoder is alone in memory."""

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

from ...families.image import IMAGE, TOKENS, with_mask
from ..clip_shards import Clip, write_shard
from ..normalisation import notes_of
from ..progress import Report
from ..shard_files import read_notes
from .begun import encode_begun
from .config import EncodeConfig
from .frames import UnusableVideo, ahead, read_frames, to_pixels
from .models import encode_pixels, has_image_encoder, image_encoder, latents_scale, video_vae
from .plan import WORK
from .sources import Entry, Skipped
from .text import Embeddings, read_ragged, write_embeddings

DECODERS = 4
_NOTE = "mla_convert.skipped"


class _Encoder(NamedTuple):
    """Encodes videos to latents, normalised or `raw`; with `images`, also the image conditions of first frames.

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
) -> None:
    """Encode `texts` and `shards` with the models of the pipeline in `folder`.

    Unusable videos are skipped and recorded in the shard's metadata, see `skipped_in`.
    """
    waiting = [s for s in shards if not s.captions.exists()]
    captions = [Embeddings(s.captions, [entry.caption for entry in s.entries], ragged=True) for s in waiting]
    write_embeddings([*texts, *captions], folder, config, device, report)
    if not shards:
        return
    total, done = sum(len(shard.entries) for shard in shards), 0
    raw = config.latents == "raw"
    tokens = config.image_condition and has_image_encoder(folder)
    with (
        video_vae(folder, device) as vae,
        image_encoder(folder, device) if tokens else contextlib.nullcontext() as embed,
    ):
        encode = _Encoder(vae, raw, config.image_condition, embed)
        for shard in shards:
            notes = notes_of(latents_scale(folder) if raw else None)

            def advance(count: int) -> None:
                nonlocal done
                done += count
                report("videos", done, total)

            write_shard(shard.path, _clips(shard, encode, config, notes, advance), shard.first, notes)
            shard.captions.unlink(missing_ok=True)


def skipped_in(path: Path) -> list[Skipped]:
    """The videos planned for a shard that were skipped. Raises UserError if the shard cannot be read."""
    return [Skipped(*row) for row in json.loads(read_notes(path).get(_NOTE, "[]"))]


def _clips(
    shard: Shard,
    encode: _Encoder,
    config: EncodeConfig,
    notes: dict[str, str],
    advance: Callable[[int], None],
) -> Iterator[Clip]:
    """Yield the clips of a shard; at the end, `notes` lists the skipped videos."""

    def read(number: int) -> tuple[int, Tensor | str]:
        try:
            size = config.frames, config.height, config.width, config.fps
            return number, read_frames(shard.entries[number].path, *size)
        except UnusableVideo as error:
            return number, str(error)

    texts, skipped = read_ragged(shard.captions), []
    decoded = ahead(read, range(len(shard.entries)), DECODERS)
    while batch := list(islice(decoded, config.batch_size)):
        usable = [(number, found) for number, found in batch if isinstance(found, Tensor)]
        skipped += [(shard.entries[n].name, found) for n, found in batch if isinstance(found, str)]
        if usable:
            encoded = encode([frames for _, frames in usable])
            for (number, _), (latents, conditions) in zip(usable, encoded, strict=True):
                yield _clip(shard.entries[number], latents, conditions, texts[number], config)
        advance(len(batch))
    if skipped:
        notes[_NOTE] = json.dumps(skipped)


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
