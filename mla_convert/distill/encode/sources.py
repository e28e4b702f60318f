"""Finds videos and their captions: caption files, or a table as in Hugging Face's video folders."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ...errors import UserError
from ..shard_files import of_all
from .frames import is_outage, problem_of

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
TABLES = ("metadata.csv", "metadata.jsonl", "metadata.json", "videos.csv", "videos.jsonl", "captions.json")
FILE_COLUMNS = ("file_name", "path", "video")
TEXT_COLUMNS = ("text", "caption", "prompt", "cap")


Item = TypeVar("Item")
Result = TypeVar("Result")

_AT_ONCE = 512


class Entry(NamedTuple):
    """A video of the source; `name` is its path as the source gives it, `problem` why it cannot be encoded, or ""."""

    name: str
    caption: str
    path: Path
    problem: str = ""


class Skipped(NamedTuple):
    """A video that is skipped, and the reason."""

    name: str
    reason: str


def find_videos(source: Path) -> list[Entry]:
    """All videos of a folder or a table, sorted by name, also those without a caption or a file.

    A folder holds one of TABLES, or `name.txt` beside each `name.mp4`, also in subfolders. A table
    (`.csv`, `.jsonl`, `.json`) has the columns `file_name`, relative to the table, and `text`; JSON
    may also map names to texts. Raises UserError if the source has no usable videos or cannot be read.
    """
    if source.is_dir():
        tables = [source / name for name in TABLES if (source / name).is_file()]
        if len(tables) > 1:
            names = " and ".join(table.name for table in tables)
            raise UserError(f"{source} holds {names}; give the path of one of them instead of the folder")
        rows = _table(tables[0]) if tables else _pairs(source)
    elif source.is_file():
        rows = _table(source)
    else:
        raise UserError(f"{source} does not exist; give a folder of videos or a table of them")
    entries = _of_many(_checked, sorted(rows, key=lambda entry: entry[:2]))
    if not entries:
        raise UserError(f"{source} holds no videos; supported files are {', '.join(SUFFIXES)}")
    if all(entry.problem for entry in entries):
        first = entries[0]
        raise UserError(f"none of the {len(entries)} videos of {source} can be used; {first.name}: {first.problem}")
    return entries


def _checked(entry: Entry) -> Entry:
    """`entry` with its problem, if there is one."""
    if entry.problem:
        return entry
    if not entry.caption:
        return entry._replace(problem="its caption is empty")
    return entry._replace(problem=problem_of(entry.path))


def _of_many(ask: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`ask(item)` of every item, in order; on a network file system most of the time is waiting."""
    rest = iter(items)
    parts = iter(lambda: list(islice(rest, _AT_ONCE)), [])

    def asked(part: Sequence[Item]) -> list[Result]:
        return [ask(item) for item in part]

    return [result for results in of_all(asked, parts) for result in results]


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one per line, in order. Raises UserError if there are none."""
    prompts = [line.strip() for line in _read(path).splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompts; write one per line")
    return prompts


def _pairs(folder: Path) -> list[Entry]:
    """The videos of a folder with the captions beside them."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))

    def captioned(path: Path) -> Entry:
        name, beside = path.relative_to(folder).as_posix(), path.with_suffix(".txt")
        try:
            return Entry(name, beside.read_text(encoding="utf-8-sig").strip(), path)
        except FileNotFoundError:
            return Entry(name, "", path, f"its caption file {beside.name} does not exist")
        except (OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and is_outage(error):
                raise UserError(
                    f"cannot read {beside}: {_reason(error)}; bring its disk back or write the caption again"
                ) from None
            return Entry(name, "", path, f"{beside.name} cannot be read: {_reason(error)}")

    return _of_many(captioned, found)


def _table(path: Path) -> list[Entry]:
    text = _read(path)
    try:
        match path.suffix.lower():
            case ".csv":
                rows: Any = list(csv.DictReader(text.splitlines(keepends=True)))
            case ".jsonl":
                rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            case ".json":
                rows = json.loads(text)
            case _:
                raise UserError(f"{path} is not a table of videos; give a .csv, .jsonl or .json file")
    except (json.JSONDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if isinstance(rows, dict):
        rows = [{"file_name": name, "text": text} for name, text in rows.items()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} is not a table of videos; write rows with file_name and text")
    entries = []
    for number, row in enumerate(rows, 1):
        name, caption = (_cell(path, number, row, columns) for columns in (FILE_COLUMNS, TEXT_COLUMNS))
        entries.append(Entry(name, caption, path.parent / name))
    return entries


def _cell(path: Path, number: int, row: Mapping[str, Any], columns: Iterable[str]) -> str:
    """The text of the first of `columns` that a row has; of a list, the first text."""
    for column in columns:
        if column in row:
            value = row[column]
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, str):
                return value.strip()
            if value in (None, []):
                return ""
            raise UserError(f"{path}, row {number}: {column} is not text")
    found = ", ".join(map(str, row))
    raise UserError(f"{path}, row {number}: none of the columns {', '.join(columns)} exists; the row has {found}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from None


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror or str(error)
