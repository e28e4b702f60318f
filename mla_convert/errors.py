"""Errors a user can act on: one line that names the thing and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The command failed; exit code 1."""

    exit_code = 1


class UsageError(UserError):
    """The recipe or the command line is wrong; exit code 2, nothing was started."""

    exit_code = 2


def nearest(word: str, valid: Iterable[str]) -> str:
    """`did you mean X?`, or the valid words where none is near."""
    known = list(valid)
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {matches[0]}?" if matches else f"valid here: {', '.join(known)}"
