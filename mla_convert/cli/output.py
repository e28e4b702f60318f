"""Prints results to stdout and everything else to stderr."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from ..errors import visible

DEBUG = "MLA_CONVERT_DEBUG"
JSON = "--json"
_UNBOUNDED = 10_000


class _Notes(logging.Handler):
    """Writes the package's log messages to stderr as plain lines, signed with the host in a launch's others.

    What each model of a command says alike, such as the kernels chosen, is written once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno <= logging.INFO:
            if record.getMessage() in self.said:
                return
            self.said.add(record.getMessage())
        origin = f"{socket.gethostname()}: " if int(os.environ.get("RANK") or 0) else ""
        sys.stderr.write(f"{origin}{visible(record.getMessage())}\n")


def show_notes() -> None:
    """Show the package's log messages (choices it makes, warnings) on stderr; called once per command."""
    logger = logging.getLogger("mla_convert")
    for handler in [handler for handler in logger.handlers if isinstance(handler, _Notes)]:
        logger.removeHandler(handler)
    logger.addHandler(_Notes())
    logger.setLevel(logging.INFO)


def hide_bars(arguments: Sequence[str]) -> None:
    """Without a terminal and with --json, hide the progress bars of libraries that are imported after this.

    A setting of the user stays.
    """
    if JSON in arguments or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


class _Console(Console):
    """Prints strings, those in tables too, as they are: brackets are not markup, control characters are escaped.

    Without a terminal, tables are as wide as what they hold, unless COLUMNS says otherwise.
    """

    def __init__(self, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False)
        if not self.is_terminal and "COLUMNS" not in os.environ:
            self.width = _UNBOUNDED

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)


def stderr() -> Console:
    """The console for progress and notes."""
    return _Console(stderr=True)


def print_result(
    as_json: bool, value: dict[str, Any], *rendered: RenderableType | Callable[[], RenderableType]
) -> None:
    """Print `value` as one JSON object, or `rendered` for people; callables in it are called only then."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
        sys.stdout.flush()
        return
    console = _Console()
    for item in rendered:
        renderable = item() if callable(item) else item
        if isinstance(renderable, str):
            # File names must not be wrapped.
            console.print(renderable, soft_wrap=True, highlight=False)
        else:
            console.print(renderable)


def print_error(message: str) -> None:
    """Print an error to stderr, in one line."""
    sys.stderr.write(f"error: {visible(' '.join(message.split()))}\n")
