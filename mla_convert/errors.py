"""Errors that a user can act on: one line that names the problem, then the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The command failed; exit code 1."""

    exit_code = 1


class UsageError(UserError):
    """The recipe or the command line is wrong and nothing was started; exit code 2."""

    exit_code = 2


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return `did you mean X?` for the closest valid word, or a list of all valid words if none is close."""
    words = list(valid)
    matches = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean {matches[0]}?" if matches else f"valid here: {', '.join(words)}"
