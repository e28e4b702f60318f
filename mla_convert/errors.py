"""Errors that a user can act on: one short line that names the problem, then the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

_NAMED, _QUOTED, _BEGINNING = 3, 60, 3


class UserError(Exception):
    """The command failed; exit code 1."""

    exit_code = 1


class UsageError(UserError):
    """The recipe or the command line is wrong and nothing was started; exit code 2."""

    exit_code = 2


class RecipeError(UsageError):
    """Keys of a recipe, or arguments like them, have mistakes, each described in one of `lines`.

    As a message, it is the first and the number of the others.
    """

    @property
    def lines(self) -> tuple[str, ...]:
        return self.args

    def __str__(self) -> str:
        others = len(self.lines) - 1
        return f"{self.lines[0]} (and {others} more)" if others else self.lines[0]


def lacks_memory(error: BaseException) -> bool:
    """Whether an exception means lack of memory, which torch on a CPU and Triton raise as a plain RuntimeError."""
    # torch's class by its name, so that a command need not import torch to ask.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _FULL)


_FULL = ("can't allocate memory", "out of memory")


def nearest(word: str, valid: Iterable[str]) -> str:
    """`did you mean X?` for the closest valid word, or a list of all valid words if none is close.

    Close is a typing error or two, or a word that `word` begins: another model's name has much in common, too.
    """
    words = list(valid)
    matches = difflib.get_close_matches(word, words, n=1, cutoff=0.8)
    if not matches and len(word) >= _BEGINNING:
        matches = [whole for whole in words if whole.startswith(word)]
    return f"did you mean {matches[0]}?" if matches else f"valid here: {', '.join(words)}"


def few(names: Iterable[str]) -> str:
    """The first names and how many more there are, for a line that must stay short; `none` without any."""
    listed = list(names)
    more = f" and {len(listed) - _NAMED:,} more" if len(listed) > _NAMED else ""
    return f"{', '.join(listed[:_NAMED])}{more}" if listed else "none"


def quoted(value: Any) -> str:
    """The `repr` of what a user gave, cut in its middle if it is long."""
    shown = repr(value)
    half = (_QUOTED - 5) // 2
    return shown if len(shown) <= _QUOTED else f"{shown[:half]} ... {shown[-half:]}"


def visible(text: str) -> str:
    """`text` with control characters other than newlines and tabs escaped: names may come from elsewhere."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)
