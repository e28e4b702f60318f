"""Finds videos and their captions: caption files, or a table as in Hugging Face's video folders."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import UserError

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
TABLES = ("metadata.csv", "metadata.jsonl", "metadata.json", "videos.csv", "videos.jsonl", "captions.json")
FILE_COLUMNS = ("file_name", "path", "video")
TEXT_COLUMNS = ("text", "caption", "prompt", "cap")


class Entry(NamedTuple):
    """A video to encode; `name` is its path as the source gives it."""

    name: str
    caption: str
    path: Path


class Skipped(NamedTuple):
    """A video that is skipped, and the reason."""

    name: str
    reason: str


def find_videos(source: Path) -> tuple[list[Entry], list[Skipped]]:
    """Return the videos of a folder or a table, sorted by name, and those without a caption or a file.

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
    entries, skipped = [], []
    for entry, problem in sorted(rows, key=lambda row: row[0][:2]):
        if problem or not entry.caption:
            skipped.append(Skipped(entry.name, problem or "its caption is empty"))
        elif not entry.path.is_file():
            skipped.append(Skipped(entry.name, "there is no such file"))
        else:
            entries.append(entry)
    if not entries:
        if not skipped:
            raise UserError(f"{source} holds no videos; supported files are {', '.join(SUFFIXES)}")
        first = skipped[0]
        raise UserError(f"none of the {len(skipped)} videos of {source} can be used; {first.name}: {first.reason}")
    return entries, skipped


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a text file, one per line, in order. Raises UserError if there are none."""
    prompts = [line.strip() for line in _read(path).splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompts; write one per line")
    return prompts


def _pairs(folder: Path) -> list[tuple[Entry, str]]:
    """The videos of a folder with the captions beside them, and the problem with each caption, "" if none."""
    rows = []
    for path in folder.rglob("*"):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        beside = path.with_suffix(".txt")
        caption, problem = "", ""
        try:
            caption = beside.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            problem = f"its caption file {beside.name} does not exist"
        except (OSError, UnicodeDecodeError) as error:
            problem = f"{beside.name} cannot be read: {_reason(error)}"
        rows.append((Entry(path.relative_to(folder).as_posix(), caption, path), problem))
    return rows


def _table(path: Path) -> list[tuple[Entry, str]]:
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
        entries.append((Entry(name, caption, path.parent / name), ""))
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
