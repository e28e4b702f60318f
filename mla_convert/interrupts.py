"""Makes the first of some signals interrupt what runs the way Ctrl-C does, wherever it comes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit codes of what Ctrl-C and SIGTERM have ended."""
_AGAIN_SECONDS = 0.05


class Interrupt:
    """A handler that raises KeyboardInterrupt at the first signal, whose number `received` then holds.

    Later ones are ignored, so as not to disturb the cleanup: `timeout` sends two. In forked processes signals keep
    their default action.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._owner, self._shown = os.getpid(), sys.unraisablehook

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.received:
            self.received.append(number)
            raise KeyboardInterrupt

    def dropped(self, unraisable: Any) -> None:
        """Send the signal again if Python has dropped its exception, as it does in `__del__`; it would here too."""
        if self.received and unraisable.exc_type is KeyboardInterrupt:
            threading.Timer(_AGAIN_SECONDS, self._again, (self.received.pop(),)).start()
        else:
            self._shown(unraisable)

    def _again(self, number: int) -> None:
        # Another one may have come in between, and the block may have ended by it.
        if not self.received:
            os.kill(self._owner, number)


@contextlib.contextmanager
def interrupted_by(numbers: Iterable[int], ignored: bool = False) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt in the block at the first of the signals `numbers`; yields a list that then holds it.

    If they are `ignored`, it holds none. A block inside another one shares its list, so that a second signal is
    ignored while the outer block ends, too. Outside of the main thread, where Python allows no handlers, the list stays
    empty.
    """
    outer = signal.getsignal(signal.SIGTERM)
    handler = outer if isinstance(outer, Interrupt) else Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield []
        return
    before, shown = {number: signal.getsignal(number) for number in numbers}, sys.unraisablehook
    try:
        sys.unraisablehook = handler.dropped
        for number in before:
            signal.signal(number, signal.SIG_IGN if ignored else handler)
        yield handler.received
    finally:
        restore(before)
        sys.unraisablehook = shown


def restore(handlers: dict[int, Any]) -> None:
    """Install earlier handlers, by signal; None, for one that Python did not install, becomes the default action."""
    for number, handler in handlers.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
