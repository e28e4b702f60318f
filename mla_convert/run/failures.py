"""The errors of a `StreamBatch`: one stream cannot go on, or a pass of several failed."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UserError

NOT_FINITE = "its chunk contains NaN or Inf; the model diverged, or its dtype is too narrow (try float32)"


class StreamError(UserError):
    """Why `stream` ended: its own source, condition or chunk. What these raised is the cause."""

    def __init__(self, stream: int, reason: str, cause: Exception | None = None) -> None:
        super().__init__(f"stream {stream} has ended: {reason}" + ("" if cause is None else f": {_line(cause)}"))
        self.stream = stream
        self.__cause__ = cause


class RoundError(UserError):
    """A pass of `streams` failed, and the round has changed no stream. What was raised is the cause."""

    def __init__(self, streams: Sequence[int], cause: Exception) -> None:
        names = ", ".join(map(str, streams))
        super().__init__(
            f"a pass of {'stream' if len(streams) == 1 else 'streams'} {names} failed: {_line(cause)}; no stream has "
            "changed: repeat the round, or let them leave"
        )
        self.streams = list(streams)
        self.__cause__ = cause


def _line(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
