"""Reads the clips of parquet shards of latents and text embeddings, checked, normalized and in any order."""

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

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..families.image import IMAGE
from .clip_shards import COLUMNS, LATENT, NAMES, TEXT, clips_in, open_shard, read_notes, tensor_columns
from .identity import Identity, identity_of
from .image_columns import COLUMN_OF, check_first_frame, check_shapes, from_column, missing_columns, size_text
from .normalisation import BY_CHANNELS, EVIDENCE, KIND_NOTE, Latents, Scale, evidence_of_raw, scale_of

SAMPLED_CLIPS = 16
"""Clips whose statistics are measured to classify latents that no note describes."""

logger = logging.getLogger(__name__)


@functools.lru_cache(maxsize=1)
def _row_group(path: Path, process: int, group: int, columns: tuple[str, ...]) -> pa.Table:
    """A row group of several clips, decoded whole; the last one is cached because the next clip may be in it."""
    return open_shard(path).read_row_group(group, columns=list(columns), use_threads=False)


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
    """Random access to the clips of a folder or of a single shard; opening it reads only shapes.

    `latents` says whether the latents are normalised, or `raw` as a VAE's encoder returns them. `auto` follows the
    note in a shard; without one, it checks the statistics of a few clips. `conditions` names the image conditions to
    read; others are ignored.

    Raises UserError for an empty folder, missing columns, a row without a tensor, mixed shapes, latents that
    look raw but are not declared raw, or conditions that are missing or that a model cannot take.
    """

    def __init__(
        self,
        folder: Path | str,
        text_tokens: int | None = None,
        latents: Latents = "auto",
        conditions: Collection[str] = (),
    ) -> None:
        self.folder, self.text_tokens = Path(folder), text_tokens
        self.conditions = tuple(name for name in COLUMN_OF if name in conditions)
        self._columns = COLUMNS + tensor_columns(*(COLUMN_OF[name] for name in self.conditions))
        self._condition_shapes: dict[str, Sequence[int]] = {}
        self.paths = [self.folder] if self.folder.is_file() else sorted(self.folder.rglob("*.parquet"))
        if not self.paths:
            raise UserError(f"no .parquet shards in {self.folder}; write them with `mla-convert encode`")
        self._starts = [0]
        self._latent_shape: list[int] | None = None
        self._text_shape: list[int] | None = None
        # Few of thousands of shards stay open, so each one is read completely in turn.
        notes = []
        for path in self.paths:
            self._starts.append(self._starts[-1] + self._check(path))
            notes.append(read_notes(path))
        if len(self) == 0:
            raise UserError(f"the shards in {self.folder} hold no clips")
        # The statistics that normalize each shard's latents; None if they are normalized already.
        self._scales: list[Scale | None] = [None] * len(self.paths)
        self._normalise(latents, notes)
        if IMAGE in self.conditions:
            self._compare_first_frame(notes)

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

    def _normalise(self, latents: Latents, notes: Sequence[Mapping[str, str]]) -> None:
        assert self._latent_shape is not None
        channels = self._latent_shape[0]
        unknown: list[int] = []
        for number, (path, noted) in enumerate(zip(self.paths, notes, strict=True)):
            kind = noted.get(KIND_NOTE, latents)
            if latents not in ("auto", kind):
                raise UserError(f"data.latents is {latents}, but the metadata of {path} says {kind}; set it to auto")
            if kind == "raw":
                self._scales[number] = scale_of(noted, channels, str(path))
            elif kind == "auto":
                unknown += range(self._starts[number], self._starts[number + 1])
        if unknown and channels in BY_CHANNELS:
            self._refuse_raw(unknown, BY_CHANNELS[channels])

    def _refuse_raw(self, rows: list[int], scale: Scale) -> None:
        """Raise UserError if the clips `rows` have the statistics of raw latents."""
        count = min(SAMPLED_CLIPS, len(rows))
        chosen = [rows[place * len(rows) // count] for place in range(count)]
        evidence = evidence_of_raw(self._readable(chosen), scale)
        remedy = "set data.latents: raw or data.latents: normalised (inspect: --latents)"
        if evidence > EVIDENCE:
            raise UserError(
                f"the latents in {self.folder} look raw, not normalised, by their channels' statistics (FastVideo "
                f"stores raw ones); {remedy}"
            )
        if evidence > -EVIDENCE:
            what = "cannot tell whether the latents in %s are normalised, and uses them unchanged; %s"
            logger.warning(what, self.folder, remedy)

    def _compare_first_frame(self, notes: Sequence[Mapping[str, str]]) -> None:
        """Check, on the first clip of a shard that another tool wrote, that its image is encoded as this tool does."""
        for noted, start in zip(notes, self._starts, strict=False):
            if KIND_NOTE not in noted and start < len(self):
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

    def _check(self, path: Path) -> int:
        """The number of clips in a shard, after comparing every shape in it with the first clip's."""
        shard = open_shard(path)
        missing = [name for name in COLUMNS if name not in shard.schema_arrow.names]
        if missing:
            raise UserError(f"{path} has no column {', '.join(missing)}; write shards in FastVideo's t2v schema")
        held = {name: f"{column}_shape" for name, column in COLUMN_OF.items()}
        held = {name: column for name, column in held.items() if column in shard.schema_arrow.names}
        shapes = shard.read(columns=[f"{LATENT}_shape", f"{TEXT}_shape", *held.values()]).to_pydict()
        own = KIND_NOTE in read_notes(path)
        for row, (latent, text) in enumerate(zip(shapes[f"{LATENT}_shape"], shapes[f"{TEXT}_shape"], strict=True)):
            place = f"clip {row} of {path}"
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
            images = {name: shapes[column][row] or () for name, column in held.items()}
            self._check_images(images, latent, place, own)
        largest = max((shard.metadata.row_group(i).num_rows for i in range(shard.num_row_groups)), default=0)
        if largest > 1:
            _warn_of_groups(self.folder, largest)
        return clips_in(path)

    def _check_images(self, images: Mapping[str, Sequence[int]], latent: Sequence[int], place: str, own: bool) -> None:
        """Check the shapes in a clip's image columns, () where it has none, before any is read."""
        if not self.conditions:
            if any(images.values()):
                _warn_of_images(self.folder)
            return
        wanted = {name: images.get(name, ()) for name in self.conditions}
        if not self._condition_shapes:
            missing = [name for name, shape in wanted.items() if not shape]
            if missing:
                raise missing_columns(self.folder, missing)
            self._condition_shapes = wanted
        check_shapes(wanted, latent, self._condition_shapes, place, own)

    def read(self, index: int) -> dict[str, Tensor]:
        """Return clip `index`: normalised `latents` `[C, F, H, W]`, `encoder_hidden_states` `[L, D]` and conditions.

        All tensors are float32. Conditions are keyed by the model's argument names: `image_latents`
        `[4 + C, F, H, W]` with the mask, and `encoder_hidden_states_image` `[L, D]`.

        Raises UserError for a clip that cannot be unpacked, or that has NaN or infinite values.
        """
        values = self._row(index, self._columns)
        place, remedy = self._place(index), _remedy(index)
        text = _unpack(values, TEXT, place, remedy)
        if self.text_tokens is not None:
            text = F.pad(text, (0, 0, 0, self.text_tokens - len(text)))
        latents, scale = _unpack(values, LATENT, place, remedy), self._scales[self._shard(index)]
        images = {name: _unpack(values, COLUMN_OF[name], place, remedy) for name in self.conditions}
        columns = {COLUMN_OF[name]: tensor for name, tensor in images.items()}
        for name, tensor in {"latents": latents, "text embedding": text, **columns}.items():
            if not tensor.isfinite().all():
                raise UserError(f"{place}, {self._name(index)!r}, has NaN or infinite values in its {name}; {remedy}")
        return {
            "latents": latents if scale is None else scale.standardise(latents),
            "encoder_hidden_states": text,
            **{name: from_column(name, tensor, latents.shape[1]) for name, tensor in images.items()},
        }

    def caption(self, index: int) -> str:
        """The caption of clip `index`; "" if the shards have none."""
        return str(self._row(index, ["caption"]).get("caption") or "")

    def named(self, names: Collection[str]) -> dict[str, list[int]]:
        """The numbers of the clips with each of `names` as `id` or `file_name`."""
        found: dict[str, list[int]] = {name: [] for name in names}
        for path, start in zip(self.paths, self._starts, strict=False):
            shard = open_shard(path)
            columns = [column for column in NAMES if column in shard.schema_arrow.names]
            for row, values in enumerate(shard.read(columns=columns).to_pylist() if columns else []):
                for name in found.keys() & set(values.values()):
                    found[name].append(start + row)
        return found

    def _name(self, index: int) -> str:
        return next((str(name) for name in self._row(index, NAMES).values() if name), "")

    def _row(self, index: int, columns: Sequence[str]) -> dict[str, Any]:
        """The values of `columns` for clip `index`, without columns that its shard lacks."""
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        number = self._shard(index)
        row = index - self._starts[number]
        path = self.paths[number]
        shard = open_shard(path)
        group = 0
        while row >= shard.metadata.row_group(group).num_rows:
            row -= shard.metadata.row_group(group).num_rows
            group += 1
        try:
            if columns is self._columns and shard.metadata.row_group(group).num_rows > 1:
                table = _row_group(path, os.getpid(), group, self._columns)
            else:
                table = shard.read_row_group(group, columns=list(columns), use_threads=False)
            values = table.slice(row, 1).to_pylist()[0]
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"cannot read {self._place(index)}: {reason}; {_remedy(index)}") from None
        return dict(values)

    def _shard(self, index: int) -> int:
        """The number of the shard that holds clip `index`."""
        return bisect.bisect_right(self._starts, index) - 1

    def _place(self, index: int) -> str:
        number = self._shard(index)
        return f"clip {index - self._starts[number]} of {self.paths[number]}"


def _remedy(index: int) -> str:
    """What to do about a damaged clip."""
    return f"encode it again, or continue without it: data.skip: [{index}]"


def _unpack(row: dict[str, Any], name: str, place: str, remedy: str) -> Tensor:
    """The tensor in the columns `name` of a row, float32."""
    dtype = getattr(torch, (row[f"{name}_dtype"] or "").removeprefix("torch."), None)
    raw, shape = row[f"{name}_bytes"], row[f"{name}_shape"]
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"{place}: {name}_dtype {row[f'{name}_dtype']!r} is not a torch dtype; {remedy}")
    if not raw or len(raw) != torch.Size(shape).numel() * dtype.itemsize:
        raise UserError(f"{place}: {name}_bytes do not match the shape {size_text(shape)} in {dtype}; {remedy}")
    return torch.frombuffer(bytearray(raw), dtype=dtype).view(shape).float()
