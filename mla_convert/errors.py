"""Errors a user can act on: one line that names the thing and the remedy."""

from __future__ import annotations


class UserError(Exception):
    """The command failed; exit code 1."""

    exit_code = 1


class UsageError(UserError):
    """The recipe or the command line is wrong; exit code 2, nothing was started."""

    exit_code = 2
