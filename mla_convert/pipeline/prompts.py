"""Parses prompts that change during a video, from the command line or a file."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError, UserError, quoted
from ..files import unreadable
from ..recipe.reader import read_yaml
from ..recipe.schema import validate
from ..run.prompts import PromptChange

KEYS = "seconds and prompt"


def read_prompts(path: Path) -> list[PromptChange]:
    """Read a prompts file, a YAML list or JSON lines with `seconds` and `prompt` in each entry; sorted by time.

    Raises UserError for a file that cannot be read, UsageError for one that is empty or has another content.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompts from {path}: {unreadable(error)}") from None
    entries = _json_lines(path, text) if path.suffix.lower() == ".jsonl" else _yaml_list(path, text)
    if not entries:
        raise UsageError(f"{path} has no prompts; write a list of {KEYS}")
    return in_order([_change(f"{path}, entry {number}", entry) for number, entry in enumerate(entries, 1)])


def in_order(changes: Sequence[PromptChange]) -> list[PromptChange]:
    """Sort the changes by time. Raises UsageError if two have the same time."""
    ordered = sorted(changes, key=lambda change: change.seconds)
    times = [change.seconds for change in ordered]
    duplicate = next((time for time, later in itertools.pairwise(times) if time == later), None)
    if duplicate is not None:
        raise UsageError(f"two prompts begin at {duplicate:g} seconds; leave one out")
    return ordered


def _change(where: str, entry: Any) -> PromptChange:
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: {quoted(entry)} is not a mapping with {KEYS}")
    try:
        return validate(PromptChange, entry)
    except UserError as error:
        raise UsageError(f"{where}: {error}") from None


def _yaml_list(path: Path, text: str) -> list[Any]:
    try:
        entries = read_yaml(text)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    if entries is not None and not isinstance(entries, list):
        raise UsageError(f"{path} is not a list; write a list of entries with {KEYS}")
    return entries or []


def _json_lines(path: Path, text: str) -> list[Any]:
    entries = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                entries.append(json.loads(line))
            except ValueError as error:
                raise UsageError(f"{path}, line {number}: not valid JSON: {error}") from None
    return entries


def parse_change(text: str) -> PromptChange:
    """Parse a change `SECONDS:TEXT`. Raises UsageError."""
    seconds, colon, prompt = text.partition(":")
    try:
        at = float(seconds)
    except ValueError:
        colon = ""
    if not (colon and prompt.strip()):
        raise UsageError(f"{quoted(text)} is not a prompt with a time; write SECONDS:TEXT, such as '5:a cat sits'")
    return _change(f"--prompt-at {quoted(text)}", {"seconds": at, "prompt": prompt.strip()})
