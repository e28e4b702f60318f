"""Lets several streams of one pipeline compute in turns, each with its own state."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")


class Call:
    """The state of one call: `interrupt` ends it with the current chunk, `closed` with the current step."""

    def __init__(self) -> None:
        self.interrupt = False
        self.closed = threading.Event()

    @contextlib.contextmanager
    def callback(self) -> Iterator[None]:
        """A context for a callback of this call."""
        token = _CALLBACK.set(self)
        try:
            yield
        finally:
            _CALLBACK.reset(token)


_CALLBACK: contextvars.ContextVar[Call | None] = contextvars.ContextVar("callback", default=None)


class Closed(Exception):
    """The caller has closed the stream."""


class Calls:
    """The calls of a pipeline that are running, whose threads take turns in order of arrival.

    Turns keep apart what the streams share: hooks that move weights, and the capture of CUDA graphs.
    """

    def __init__(self) -> None:
        self.running: list[Call] = []
        self._changed = threading.Condition()
        self._line: deque[int] = deque()

    def __reduce__(self) -> Any:
        # A copy of a pipeline has no calls yet, and locks cannot be copied.
        return Calls, ()

    def addressed(self) -> list[Call]:
        """The call whose callback runs in this thread; outside of callbacks, all that are running."""
        current = _CALLBACK.get()
        return [current] if current in self.running else list(self.running)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """A context that one thread has at a time; that thread may enter it again."""
        if self._mine():
            yield
            return
        self._take()
        try:
            yield
        finally:
            self._give()

    def between_turns(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield `items`; while they make this thread wait, the others have their turns."""
        iterator, end = iter(items), object()
        while True:
            had = self._mine()
            if had:
                self._give()
            try:
                item: Any = next(iterator, end)
            finally:
                if had:
                    self._take()
            if item is end:
                return
            yield item

    def _mine(self) -> bool:
        with self._changed:
            return bool(self._line) and self._line[0] == threading.get_ident()

    def _take(self) -> None:
        thread = threading.get_ident()
        with self._changed:
            self._line.append(thread)
            self._changed.wait_for(lambda: self._line[0] == thread)

    def _give(self) -> None:
        with self._changed:
            self._line.popleft()
            self._changed.notify_all()
