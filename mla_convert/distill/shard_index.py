"""Lists the shards of a folder with what opening them has to know, so that one process reads their footers once.

The other processes of a run get the index from the first. A resumed run reads it from a file, and only the shards that
have changed since. A shard that can no longer be read keeps its clips, so the clips of a run stay what they were.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ..errors import UserError
from ..files import write_text
from .clip_shards import COLUMNS, LATENT, TEXT
from .image_columns import COLUMN_OF
from .normalization import KIND_NOTE, SCALE_NOTE
from .shard_files import Unreadable, notes_in, of_all, patiently, read_once, reason_of

SHARD = ".parquet"
_FORMAT = 1
_KEPT_NOTES = (KIND_NOTE, SCALE_NOTE)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """A shard of `clips` clips; `name` is its path in the folder, `size` in bytes and `modified` in ns are its file's.

    `largest` is the number of clips in its largest row group. `shapes` has one clip for each combination of shapes that
    was found: its row, and by column the shape, None where the clip has no such tensor.
    """

    name: str
    size: int
    modified: int
    clips: int
    largest: int = 0
    notes: Mapping[str, str] = field(default_factory=dict)
    shapes: Sequence[tuple[int, Mapping[str, Sequence[int] | None]]] = ()


@dataclass(frozen=True)
class ShardIndex:
    """The shards of `folder`, which may be a single one, in the order of names.

    `named` has the numbers of the clips that were searched for by name.
    """

    folder: Path
    shards: Sequence[Shard]
    named: dict[str, list[int]] = field(default_factory=dict)

    @property
    def paths(self) -> list[Path]:
        return [_path(self.folder, shard.name) for shard in self.shards]


def shard_names(folder: Path) -> set[str]:
    """The paths of the shards in `folder`, or `.` if it is a single one; empty if there is none."""
    if folder.is_file():
        return {"."}
    return {path.relative_to(folder).as_posix() for path in folder.rglob(f"*{SHARD}")}


def holds_shards(place: Path) -> bool:
    """Whether `place` is a folder with shards or a single one, and not a file of another kind."""
    return (place.is_dir() or place.suffix == SHARD) and bool(shard_names(place))


def index_shards(
    folder: Path, known: ShardIndex | None = None, skipped: Collection[str] = (), skippable: bool = True
) -> ShardIndex:
    """Read the index of `folder`; shards of `known` are read again only if their size or time differs.

    A shard of `known` that can no longer be read stays as it was. One that is also named in `skipped` may be gone; one
    that is named there and was never read counts no clips, also if it can be read by now. Raises UserError for a folder
    without shards, for any other shard that cannot be read, with the remedy to skip it if it is `skippable`, and for
    one without the columns of a clip.
    """
    names = shard_names(folder)
    before = {} if known is None else {shard.name: shard for shard in known.shards}
    names |= before.keys() & set(skipped)
    if not names:
        raise UserError(f"no .parquet shards in {folder}; write them with `mla-convert encode`")
    damaged: dict[str, str] = {}

    def indexed(path: Path) -> Shard:
        name = path.relative_to(folder).as_posix()
        old = before.get(name)
        if old is not None and not old.clips and name in skipped:
            return old
        try:
            found = patiently(path.stat)
            if old is not None and (old.size, old.modified) == (found.st_size, found.st_mtime_ns):
                return old
            return _read(path, Shard(name, found.st_size, found.st_mtime_ns, 0))
        except Unreadable as error:
            if old is None and name not in skipped:
                leave_out = f", or leave it out: data.skip: [{name}]" if skippable else ""
                raise UserError(
                    f"cannot read {path}: {reason_of(error)}; if it is truncated, write it again{leave_out}"
                ) from None
            damaged[name] = reason_of(error)
            return old or Shard(name, 0, 0, 0)

    # Paths are sorted by their parts, not by their text.
    shards = of_all(indexed, sorted(_path(folder, name) for name in names))
    unexpected = sorted(damaged.keys() - set(skipped))
    if unexpected:
        logger.warning(
            "cannot read %d of the shards in %s: %s: %s; their clips are counted as before, and data.skip: [%s] leaves "
            "them out",
            len(unexpected),
            folder,
            unexpected[0],
            damaged[unexpected[0]],
            ", ".join(unexpected[:3]),
        )
    return ShardIndex(folder, shards, dict(known.named) if known is not None and known.shards == shards else {})


def _path(folder: Path, name: str) -> Path:
    return folder if name == "." else folder / name


def _read(path: Path, shard: Shard) -> Shard:
    """`shard` with what its file holds."""

    def filled(file: pq.ParquetFile) -> Shard:
        missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
        if missing:
            raise UserError(f"{path} has no column {', '.join(missing)}; write shards in FastVideo's t2v schema")
        notes = {key: value for key, value in notes_in(file).items() if key in _KEPT_NOTES}
        largest, shapes = _shapes(file)
        return dataclasses.replace(shard, clips=file.metadata.num_rows, largest=largest, notes=notes, shapes=shapes)

    return read_once(path, filled)


def _shapes(file: pq.ParquetFile) -> tuple[int, list[tuple[int, dict[str, list[int] | None]]]]:
    """The number of clips in the largest row group, and the `Shard.shapes` of an open shard.

    All shapes of a clip with a row group of its own are read only if its tensors take other bytes than those of clips
    before it: the footer has these sizes. Upright and wide clips may take the same, so the latents' shape alone is read
    otherwise, unless this package has written the shard: then all its clips have one shape.
    """
    leaves = [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)]
    tensors = [name for name in (LATENT, TEXT, *COLUMN_OF.values()) if f"{name}_bytes" in leaves]
    places = [leaves.index(f"{name}_bytes") for name in tensors]
    columns, latent = [f"{name}_shape" for name in tensors], f"{LATENT}_shape"
    alike = KIND_NOTE in notes_in(file)
    first = largest = 0
    seen: dict[tuple[int, ...], list[Sequence[int] | None]] = {}
    found: dict[str, tuple[int, dict[str, list[int] | None]]] = {}

    def read(number: int, chosen: list[str]) -> list[dict[str, list[int] | None]]:
        rows: list[dict[str, list[int] | None]] = file.read_row_group(
            number, columns=chosen, use_threads=False
        ).to_pylist()
        return rows

    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        sizes = tuple(group.column(place).total_uncompressed_size for place in places)
        known = seen.setdefault(sizes, [])
        single = group.num_rows == 1 and known
        if not single or not (alike or read(number, [latent])[0][latent] in known):
            for row, shapes in enumerate(read(number, columns), first):
                found.setdefault(json.dumps(shapes), (row, shapes))
                known.append(shapes[latent])
        first, largest = first + group.num_rows, max(largest, group.num_rows)
    return largest, list(found.values())


def write_index(path: Path, index: ShardIndex) -> None:
    """Write an index as JSON, unless the file has it already."""
    content = {
        "format": _FORMAT,
        "folder": str(index.folder),
        "shards": [list(dataclasses.astuple(shard)) for shard in index.shards],
        "named": index.named,
    }
    text = json.dumps(content) + "\n"
    if not path.is_file() or path.read_bytes() != text.encode():
        write_text(path, text)


def read_index(path: Path, folder: Path) -> ShardIndex | None:
    """The index of `folder` that `write_index` wrote; None if there is none that can be used."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        if (content["format"], content["folder"]) != (_FORMAT, str(folder)):
            return None
        # As JSON has no tuples.
        shards = [Shard(*values) for values in content["shards"]]
        shards = [dataclasses.replace(each, shapes=[(row, shapes) for row, shapes in each.shapes]) for each in shards]
        return ShardIndex(folder, shards, content["named"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
