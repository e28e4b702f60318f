"""Lets the threads that use one model compute in turns, in order of arrival."""

from __future__ import annotations

import contextlib
import contextvars
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

Item = TypeVar("Item")


class Closed(Exception):
    """The caller has closed the stream."""


class Call:
    """The state of one call: `interrupt` ends it with the current chunk, `closed` with the current step.

    A call that `starter` starts in its callback may compute in the turn of `starter`, which waits for it there.
    """

    def __init__(self, turns: Turns, starter: Call | None = None) -> None:
        self.turns = turns
        self.interrupt = False
        self.closed: threading.Event = _Closing(turns)
        self._root = None if starter is None else starter.root

    @property
    def root(self) -> Call:
        """The call outside of all callbacks that this one belongs to."""
        return self._root or self

    @contextlib.contextmanager
    def callback(self) -> Iterator[None]:
        """A context for a callback of this call."""
        token = _CALLBACK.set(self)
        try:
            with self.turns.lent():
                yield
        finally:
            _CALLBACK.reset(token)


_CALLBACK: contextvars.ContextVar[Call | None] = contextvars.ContextVar("callback", default=None)


def in_callback() -> Call | None:
    """The call whose callback runs in this thread, if any."""
    return _CALLBACK.get()


@dataclass(eq=False)
class _Place:
    """A thread that has a turn or waits for one, for `call` if any; `lends`: calls of its callback may compute."""

    thread: int
    call: Call | None
    lends: bool = False

    def serves(self, other: _Place) -> bool:
        return self.call is not None and other.call is not None and self.call.root is other.call.root


class Turns:
    """Turns keep apart what the calls of a model share: hooks that move weights, and the capture of CUDA graphs."""

    def __init__(self) -> None:
        # Reentrant, because a stream may be collected, and so ended, anywhere.
        self.changed = threading.Condition(threading.RLock())
        self._line: list[_Place] = []
        # All but the last one lend their turn.
        self._held: list[_Place] = []

    @contextlib.contextmanager
    def turn(self, call: Call | None = None) -> Iterator[None]:
        """A context that one thread has at a time; that thread may enter it again. Raises Closed once `call` is."""
        held = self._own()
        place = held or _Place(threading.get_ident(), call)
        lends = place.lends
        try:
            if held is None:
                self._take(place)
            else:
                self._take_back(place, call)
            yield
        finally:
            if held is None:
                self._give(place)
            else:
                self._lend(place, lends)

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """A context for a callback in a turn: calls that it has started may take the turn meanwhile."""
        place = self._own()
        if place is None:
            yield
            return
        self._lend(place, True)
        try:
            yield
        finally:
            self._take_back(place)

    def between_turns(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield `items`; while they make this thread wait, the others have their turns."""
        iterator, end = iter(items), object()
        while True:
            place = self._own()
            if place is not None:
                self._give(place)
            try:
                item: Any = next(iterator, end)
            finally:
                if place is not None:
                    self._take(place)
            if item is end:
                return
            yield item

    def when_idle(self, work: Callable[[], Any]) -> None:
        """Do `work` in a turn if no thread has one or waits for one; otherwise return."""
        place = _Place(threading.get_ident(), None)
        try:
            with self.changed:
                if self._held or self._line:
                    return
                self._held.append(place)
            work()
        finally:
            self._give(place)

    def _own(self) -> _Place | None:
        """The turn of this thread, if it has one."""
        with self.changed:
            return next((place for place in self._held if place.thread == threading.get_ident()), None)

    def _take(self, place: _Place) -> None:
        """Wait for a turn; after an exception, `_give` ends the wait."""
        with self.changed:
            self._line.append(place)
            self._wait(lambda: self._next() is place, place.call)
            self._held.append(place)
            self._line.remove(place)

    def _take_back(self, place: _Place, call: Call | None = None) -> None:
        """Wait until no other thread computes in this one's turn, and lend it no longer."""
        with self.changed:
            place.lends = False
            # A turn that was given up between two items and never came back is nobody's.
            self._wait(lambda: place not in self._held or self._held[-1] is place, call)

    def _next(self) -> _Place | None:
        """The first in line who may have a turn now."""
        if not self._held:
            return self._line[0]
        last = self._held[-1]
        return next((place for place in self._line if last.lends and last.serves(place)), None)

    def _wait(self, ready: Callable[[], bool], call: Call | None) -> None:
        closed = threading.Event() if call is None else call.closed
        self.changed.wait_for(lambda: ready() or closed.is_set())
        if closed.is_set():
            raise Closed

    def _lend(self, place: _Place, lends: bool) -> None:
        with self.changed:
            place.lends = lends
            self.changed.notify_all()

    def _give(self, place: _Place) -> None:
        """End a turn, or the wait for it."""
        with self.changed:
            for places in (self._line, self._held):
                if place in places:
                    places.remove(place)
            self.changed.notify_all()


class _Closing(threading.Event):
    """An event that also ends a wait for a turn."""

    def __init__(self, turns: Turns) -> None:
        super().__init__()
        self._changed = turns.changed

    def set(self) -> None:
        super().set()
        with self._changed:
            self._changed.notify_all()


_OF_MODELS: weakref.WeakKeyDictionary[Any, Turns] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def turns_of(model: Any) -> Turns:
    """The turns of all who compute with `model`, such as pipelines that share it."""
    with _LOCK:
        return _OF_MODELS.setdefault(model, Turns())
