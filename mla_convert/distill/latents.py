"""Reads the clips of parquet shards (`clip_shards.py`) by number, as a model takes them."""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..finite import all_finite
from ..mla.image import IMAGE
from .clip_shards import COLUMNS, LATENT, NAMES, TEXT, tensor_columns
from .identity import Identity, identity_of
from .image_columns import (
    COLUMN_OF,
    check_first_frame,
    check_shapes,
    from_column,
    missing_columns,
    size_text,
)
from .normalization import BY_CHANNELS, EVIDENCE, KIND_NOTE, Latents, Scale, evidence_of_raw, scale_of
from .shard_files import Unreadable, of_all, read_from, read_once, reason_of, row_group
from .shard_index import Shard, ShardIndex, index_shards

SAMPLED_CLIPS = 16
"""Clips whose statistics are measured to classify latents that no note describes."""

logger = logging.getLogger(__name__)


@functools.cache
def _warn_of_groups(folder: Path, clips: int) -> None:
    logger.warning(
        "%s has row groups of %d clips, and reading a clip decodes its whole group; write the shards with one clip per "
        "row group (docs/encode.md)",
        folder,
        clips,
    )


@functools.cache
def _warn_of_images(folder: Path) -> None:
    logger.warning("the clips in %s hold images, but the model takes none; they are not read", folder)


class LatentShards:
    """Random access to the clips of a folder or of a single shard; opening it reads only its `ShardIndex`.

    `latents` says whether the latents are normalized, or `raw` as a VAE's encoder returns them. `auto` follows the
    note in a shard; without one, it checks the statistics of a few clips. `conditions` names the image conditions to
    read; others are ignored. `index` is read from the folder by default; an index that is `checked`, because another
    process has opened the clips with it, is taken as it is. Only for clips that are `skippable` is data.skip a remedy.

    Raises UserError for an empty folder, missing columns, a row without a tensor, mixed shapes, latents that
    look raw but are not declared raw, or conditions that are missing or that a model cannot take. The shapes of a
    clip that the index leaves out are checked when it is read.
    """

    def __init__(
        self,
        folder: Path | str,
        text_tokens: int | None = None,
        latents: Latents = "auto",
        conditions: Collection[str] = (),
        index: ShardIndex | None = None,
        checked: bool = False,
        skippable: bool = True,
    ) -> None:
        self.folder, self.text_tokens, self.skippable = Path(folder), text_tokens, skippable
        self.conditions = tuple(name for name in COLUMN_OF if name in conditions)
        self._columns = COLUMNS + tensor_columns(*(COLUMN_OF[name] for name in self.conditions))
        self._condition_shapes: dict[str, Sequence[int]] = {}
        self.index = index_shards(self.folder, skippable=skippable) if index is None else index
        self.paths = self.index.paths
        self._starts = [0, *itertools.accumulate(shard.clips for shard in self.index.shards)]
        self._latent_shape: list[int] | None = None
        self._text_shape: list[int] | None = None
        if len(self) == 0:
            raise UserError(f"the shards in {self.folder} hold no clips")
        for path, shard in zip(self.paths, self.index.shards, strict=True):
            self._check(path, shard)
            if checked and shard.shapes:
                break
        # The statistics that normalize each shard's latents; None if they are normalized already.
        self._scales: list[Scale | None] = [None] * len(self.paths)
        self._normalize(latents, checked)
        if IMAGE in self.conditions and not checked:
            self._compare_first_frame()

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def identity(self) -> Identity:
        """Identifies this set of clips, see `identity.py`."""
        return identity_of(self.folder, self.paths, [b - a for a, b in itertools.pairwise(self._starts)])

    def split(self, heldout: int) -> int:
        """The number of clips left for training after setting aside the last `heldout`. Raises UserError if none."""
        if heldout >= len(self):
            raise UserError(
                f"{self.folder} holds {len(self)} clips and heldout: {heldout} leaves none to train on; lower heldout"
            )
        return len(self) - heldout

    def _normalize(self, latents: Latents, checked: bool) -> None:
        assert self._latent_shape is not None
        channels = self._latent_shape[0]
        unknown: list[int] = []
        for number, (path, shard) in enumerate(zip(self.paths, self.index.shards, strict=True)):
            kind = shard.notes.get(KIND_NOTE, latents)
            if latents not in ("auto", kind):
                raise UserError(f"data.latents is {latents}, but the metadata of {path} says {kind}; set it to auto")
            if kind == "raw":
                self._scales[number] = scale_of(shard.notes, channels, str(path))
            elif kind == "auto":
                unknown += range(self._starts[number], self._starts[number + 1])
        if unknown and channels in BY_CHANNELS and not checked:
            self._refuse_raw(unknown, BY_CHANNELS[channels])

    def _refuse_raw(self, rows: list[int], scale: Scale) -> None:
        """Raise UserError if the clips `rows` have the statistics of raw latents."""
        count = min(SAMPLED_CLIPS, len(rows))
        chosen = [rows[place * len(rows) // count] for place in range(count)]
        evidence = evidence_of_raw(self._readable(chosen), scale)
        remedy = "set data.latents: raw or data.latents: normalized (inspect: --latents)"
        if evidence > EVIDENCE:
            raise UserError(
                f"the latents in {self.folder} look raw, not normalized, by their channels' statistics (FastVideo "
                f"stores raw ones); {remedy}"
            )
        if evidence > -EVIDENCE:
            what = "cannot tell whether the latents in %s are normalized, and uses them unchanged; %s"
            logger.warning(what, self.folder, remedy)

    def _compare_first_frame(self) -> None:
        """Check, on the first clip of a shard that another tool wrote, that its image is encoded as this tool does."""
        for shard, start in zip(self.index.shards, self._starts, strict=False):
            if KIND_NOTE not in shard.notes and start < len(self):
                with contextlib.suppress(UserError):
                    clip = self.read(start)
                    break
        else:
            return
        check_first_frame(clip["latents"], clip[IMAGE], self._place(start))

    def _readable(self, rows: list[int]) -> Iterator[Tensor]:
        """The latents of clips. Damaged clips are passed over here; they are refused when they are needed."""
        for row in rows:
            with contextlib.suppress(UserError):
                yield self.read(row)["latents"]

    def _check(self, path: Path, shard: Shard) -> None:
        """Compare the shapes that the index has of a shard with the first clip's."""
        for row, shapes in shard.shapes:
            place = f"clip {row} of {path}"
            self._check_clip(shapes, place)
            self._check_images(shapes, place, shard)
        if shard.largest > 1:
            _warn_of_groups(self.folder, shard.largest)

    def _check_clip(self, shapes: Mapping[str, Any], place: str) -> None:
        """Check the shapes of latents and text, by column; those of the first clip are kept."""
        latent, text = shapes[f"{LATENT}_shape"], shapes[f"{TEXT}_shape"]
        if not latent or len(latent) != 4:
            raise UserError(f"{place} has no latents of shape [C, F, H, W]; encode it again or remove it")
        if not text or len(text) != 2:
            raise UserError(f"{place} has no text embedding of shape [L, D]; encode its caption or remove it")
        if self.text_tokens is not None:
            if text[0] > self.text_tokens:
                raise UserError(f"{place} has {text[0]} text tokens; raise text_tokens: {self.text_tokens}")
            text = [self.text_tokens, text[1]]
        self._latent_shape = self._latent_shape or latent
        self._text_shape = self._text_shape or text
        if latent != self._latent_shape:
            raise UserError(
                f"{place} has latents of {size_text(latent)}, the first clip has {size_text(self._latent_shape)}; "
                "keep clips of different shapes in separate folders"
            )
        if text != self._text_shape:
            raise UserError(
                f"{place} has a text embedding of {size_text(text)}, the first clip has "
                f"{size_text(self._text_shape)}; set text_tokens to pad them to one length"
            )

    def _check_images(self, shapes: Mapping[str, Any], place: str, shard: Shard) -> None:
        """Check the shapes of a clip's image columns, before any is read."""
        images = {name: shapes.get(f"{column}_shape") or () for name, column in COLUMN_OF.items()}
        if not self.conditions:
            if any(images.values()):
                _warn_of_images(self.folder)
            return
        wanted = {name: images[name] for name in self.conditions}
        if not self._condition_shapes:
            missing = [name for name, shape in wanted.items() if not shape]
            if missing:
                raise missing_columns(self.folder, missing)
            self._condition_shapes = wanted
        check_shapes(wanted, shapes[f"{LATENT}_shape"], self._condition_shapes, place, KIND_NOTE in shard.notes)

    def read(self, index: int) -> dict[str, Tensor]:
        """Clip `index`: normalized `latents` `[C, F, H, W]`, `encoder_hidden_states` `[L, D]` and conditions.

        All tensors are float32. Conditions are keyed by the model's argument names: `image_latents`
        `[4 + C, F, H, W]` with the mask, and `encoder_hidden_states_image` `[L, D]`.

        Raises UserError for a clip that cannot be unpacked, that has NaN or infinite values, or that has other shapes
        than the first.
        """
        values = self._row(index, self._columns)
        place, remedy = self._place(index), self._remedy(index)
        try:
            self._check_clip(values, place)
            self._check_images(values, place, self.index.shards[self._shard(index)])
        except UserError as error:
            if not self.skippable:
                raise
            raise UserError(f"{error}; or continue without it: data.skip: [{index}]") from None
        text = _unpack(values, TEXT, place, remedy)
        if self.text_tokens is not None:
            text = F.pad(text, (0, 0, 0, self.text_tokens - len(text)))
        latents, scale = _unpack(values, LATENT, place, remedy), self._scales[self._shard(index)]
        images = {name: _unpack(values, COLUMN_OF[name], place, remedy) for name in self.conditions}
        columns = {COLUMN_OF[name]: tensor for name, tensor in images.items()}
        for name, tensor in {"latents": latents, "text embedding": text, **columns}.items():
            if not all_finite(tensor):
                raise UserError(f"{place}, {self._name(index)!r}, has NaN or infinite values in its {name}; {remedy}")
        return {
            "latents": latents if scale is None else scale.standardize(latents),
            "encoder_hidden_states": text,
            **{name: from_column(name, tensor, latents.shape[1]) for name, tensor in images.items()},
        }

    def text(self, index: int) -> Tensor:
        """`encoder_hidden_states` `[L, D]` of clip `index`, float32, without reading its latents. Raises UserError."""
        columns = tensor_columns(TEXT)
        place, remedy = self._place(index), self._remedy(index)
        text = _unpack(self._row(index, columns), TEXT, place, remedy)
        assert self._text_shape is not None
        if self.text_tokens is not None and len(text) <= self.text_tokens:
            text = F.pad(text, (0, 0, 0, self.text_tokens - len(text)))
        if list(text.shape) != self._text_shape:
            raise UserError(f"{place} has a text embedding of another size than the first clip; {remedy}")
        if not all_finite(text):
            raise UserError(
                f"{place}, {self._name(index)!r}, has NaN or infinite values in its text embedding; {remedy}"
            )
        return text

    @property
    def text_shape(self) -> tuple[int, int]:
        """The shape (L, D) of every text embedding."""
        assert self._text_shape is not None
        tokens, width = self._text_shape
        return tokens, width

    def caption(self, index: int) -> str:
        """The caption of clip `index`; "" if the shards have none."""
        return str(self._row(index, ["caption"]).get("caption") or "")

    def numbers(self, names: Collection[str]) -> dict[str, list[int]]:
        """The numbers of the clips that each of `names` stands for: a shard, or the `id` or `file_name` of a clip."""
        unknown = set(names) - self.index.named.keys()
        found = self.index.named
        if unknown:
            searched, whole = self._searched(unknown)
            found = found | searched
            # The next search may find more in a shard that could not be read.
            if whole:
                self.index.named.update(searched)
        return {name: found[name] for name in names}

    def _searched(self, names: Collection[str]) -> tuple[dict[str, list[int]], bool]:
        """The numbers of the clips of each name, and whether all shards could be searched."""
        shards = {shard.name: number for number, shard in enumerate(self.index.shards)}
        found = {name: list(range(*self._starts[shards[name] :][:2])) for name in names if name in shards}
        found.update({name: [] for name in names if name not in shards})
        searched = {name for name in names if name not in shards}

        def matching(number: int) -> list[tuple[str, int]] | None:
            first, end = self._starts[number : number + 2]

            def rows(file: pq.ParquetFile) -> list[tuple[str, int]]:
                columns = [column for column in NAMES if column in file.schema_arrow.names]
                each = file.read(columns=columns, use_threads=False).to_pylist() if columns else []
                return [
                    (name, row)
                    for row, own in zip(range(first, end), each, strict=False)
                    for name in searched & set(own.values())
                ]

            # A shard that cannot be read is named, or its clips are refused when they are read.
            with contextlib.suppress(*Unreadable):
                return read_once(self.paths[number], rows)
            return None

        filled = [number for number, shard in enumerate(self.index.shards) if shard.clips and searched]
        matches = of_all(matching, filled)
        for name, row in itertools.chain.from_iterable(rows or () for rows in matches):
            found[name].append(row)
        return found, None not in matches

    def _name(self, index: int) -> str:
        return next((str(name) for name in self._row(index, NAMES).values() if name), "")

    def _row(self, index: int, columns: Sequence[str]) -> dict[str, Any]:
        """The values of `columns` for clip `index`, without columns that its shard lacks."""
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        number = self._shard(index)
        row, path = index - self._starts[number], self.paths[number]

        def read(shard: pq.ParquetFile) -> dict[str, Any]:
            group, left = 0, row
            while left >= (size := shard.metadata.row_group(group).num_rows):
                group, left = group + 1, left - size
            if columns is self._columns and size > 1:
                table = row_group(path, os.getpid(), group, self._columns)
            else:
                table = shard.read_row_group(group, columns=list(columns), use_threads=False)
            return dict(table.slice(left, 1).to_pylist()[0])

        try:
            return read_from(path, read)
        except (*Unreadable, IndexError) as error:
            raise UserError(f"cannot read {self._place(index)}: {reason_of(error)}; {self._remedy(index)}") from None

    def _shard(self, index: int) -> int:
        """The number of the shard that holds clip `index`."""
        return bisect.bisect_right(self._starts, index) - 1

    def _place(self, index: int) -> str:
        number = self._shard(index)
        return f"clip {index - self._starts[number]} of {self.paths[number]}"

    def _remedy(self, index: int) -> str:
        """What to do about a damaged clip."""
        return "encode it again" + (f", or continue without it: data.skip: [{index}]" if self.skippable else "")


def _unpack(row: dict[str, Any], name: str, place: str, remedy: str) -> Tensor:
    """The tensor in the columns `name` of a row, float32."""
    dtype = getattr(torch, (row[f"{name}_dtype"] or "").removeprefix("torch."), None)
    raw, shape = row[f"{name}_bytes"], row[f"{name}_shape"]
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"{place}: {name}_dtype {row[f'{name}_dtype']!r} is not a torch dtype; {remedy}")
    if not raw or len(raw) != torch.Size(shape).numel() * dtype.itemsize:
        raise UserError(f"{place}: {name}_bytes do not match the shape {size_text(shape)} in {dtype}; {remedy}")
    return torch.frombuffer(bytearray(raw), dtype=dtype).view(shape).float()
