"""Writes parquet shards of VAE latents and text embeddings in FastVideo's text-to-video schema.

A tensor takes three columns: raw bytes, shape and dtype. With row groups of one clip, any clip is read
without its neighbors. Image conditions have their own columns, see `image_columns.py`.
Source of the schema: FastVideo, `fastvideo/dataset/dataloader/schema.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ..files import atomic_file
from .image_columns import COLUMN_OF, to_column

LATENT, TEXT = "vae_latent", "text_embedding"


def _tensor_fields(name: str) -> list[pa.Field]:
    return [
        pa.field(f"{name}_bytes", pa.binary()),
        pa.field(f"{name}_shape", pa.list_(pa.int64())),
        pa.field(f"{name}_dtype", pa.string()),
    ]


SCHEMA = pa.schema(
    [
        pa.field("id", pa.string()),
        *_tensor_fields(LATENT),
        *_tensor_fields(TEXT),
        pa.field("file_name", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("media_type", pa.string()),
        pa.field("width", pa.int64()),
        pa.field("height", pa.int64()),
        pa.field("num_frames", pa.int64()),
        pa.field("duration_sec", pa.float64()),
        pa.field("fps", pa.float64()),
    ]
)
NAMES = ["file_name", "id"]


def tensor_columns(*names: str) -> tuple[str, ...]:
    """The columns of the tensors `names`."""
    return tuple(each.name for name in names for each in _tensor_fields(name))


COLUMNS = tensor_columns(LATENT, TEXT)


def _schema(conditions: Iterable[str]) -> pa.Schema:
    """The schema of clips with `conditions`; FastVideo puts their columns after those of the text."""
    schema, place = SCHEMA, 1 + len(COLUMNS)
    for column in (column for name, column in COLUMN_OF.items() if name in conditions):
        for each in _tensor_fields(column):
            schema = schema.insert(place, each)
            place += 1
    return schema


@dataclass(frozen=True)
class Clip:
    """A clip to write: `latents` `[C, F, H, W]` and `encoder_hidden_states` `[L, D]`, of any float dtype.

    `width`, `height`, `fps` and `duration_sec` describe the source video. `conditions` are the model's image
    conditions: `image_latents` `[4 + C, f, H, W]`, which may end at the first frame that all later frames
    equal, and `encoder_hidden_states_image` `[L, D]`.
    """

    latents: Tensor
    encoder_hidden_states: Tensor
    name: str = ""
    caption: str = ""
    width: int = 0
    height: int = 0
    fps: float = 0.0
    duration_sec: float = 0.0
    conditions: Mapping[str, Tensor] = field(default_factory=dict)


def _pack(name: str, tensor: Tensor) -> dict[str, Any]:
    raw = tensor.detach().cpu().contiguous()
    return {
        f"{name}_bytes": raw.view(torch.uint8).numpy().tobytes(),
        f"{name}_shape": list(raw.shape),
        f"{name}_dtype": str(raw.dtype).removeprefix("torch."),
    }


def _pack_condition(name: str, condition: Tensor) -> dict[str, Any]:
    return _pack(COLUMN_OF[name], to_column(name, condition))


def _row(clip: Clip, number: int) -> dict[str, Any]:
    name = clip.name or f"clip-{number:08d}"
    return {
        "id": name,
        **_pack(LATENT, clip.latents),
        **_pack(TEXT, clip.encoder_hidden_states),
        **{key: x for name, given in clip.conditions.items() for key, x in _pack_condition(name, given).items()},
        "file_name": name,
        "caption": clip.caption,
        "media_type": "video",
        "width": clip.width,
        "height": clip.height,
        "num_frames": clip.latents.shape[1],
        "duration_sec": clip.duration_sec,
        "fps": clip.fps,
    }


def write_shard(path: Path, clips: Iterable[Clip], first: int = 0, notes: Mapping[str, str] | None = None) -> None:
    """Write one shard atomically. It takes `clips` one at a time and numbers clips without a name from `first`.

    All clips must have the conditions of the first. `notes` are written as metadata after the last clip.
    """
    remaining = iter(clips)
    head = list(itertools.islice(remaining, 1))
    schema = _schema(head[0].conditions) if head else SCHEMA
    with atomic_file(path) as temporary, pq.ParquetWriter(temporary, schema, use_dictionary=False) as writer:
        for number, clip in enumerate(itertools.chain(head, remaining), first):
            writer.write_table(pa.Table.from_pylist([_row(clip, number)], schema), row_group_size=1)
        if notes:
            writer.add_key_value_metadata(dict(notes))


def write_latents(
    folder: Path | str, clips: Iterable[Clip], clips_per_shard: int = 64, first_shard: int = 0
) -> list[Path]:
    """Write `clips` as `shard-00000.parquet` and so on, each atomically; returns the paths."""
    remaining = iter(clips)
    shards: list[Path] = []
    for shard in itertools.count(first_shard):
        in_shard = list(itertools.islice(remaining, clips_per_shard))
        if not in_shard:
            return shards
        shards.append(Path(folder) / shard_name(shard))
        write_shard(shards[-1], in_shard, shard * clips_per_shard)
    raise AssertionError("unreachable")


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.parquet"
