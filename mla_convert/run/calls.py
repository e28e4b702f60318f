"""The calls of a pipeline that have not ended, each with its own state."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from .turns import Call, Turns, in_callback


class Calls:
    """The calls of a pipeline from when they are made until they end, or until nobody can run them anymore."""

    def __init__(self) -> None:
        self.running: weakref.WeakSet[Call] = weakref.WeakSet()
        # Reentrant, because a stream may be collected, and so ended, anywhere.
        self._lock = threading.RLock()

    def __reduce__(self) -> Any:
        # A copy of a pipeline has no calls yet, and locks cannot be copied.
        return Calls, ()

    def begin(self, turns: Turns) -> Call:
        """A new call, which takes `turns`."""
        call = Call(turns, in_callback())
        with self._lock:
            self.running.add(call)
        return call

    def end(self, call: Call) -> None:
        with self._lock:
            self.running.discard(call)

    def addressed(self) -> list[Call]:
        """The call whose callback runs in this thread; outside of callbacks, all that have not ended."""
        current = in_callback()
        with self._lock:
            return [current] if current is not None and current in self.running else list(self.running)
