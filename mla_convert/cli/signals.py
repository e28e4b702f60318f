"""SIGTERM ends a command as Ctrl-C does: nothing half-written stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def orderly_end() -> Iterator[list[int]]:
    """The first SIGTERM raises KeyboardInterrupt in the block; yields a list, which then has its number.

    It keeps its default meaning in the workers of a launcher, which would wait for each other for ever, in processes
    forked here, and where somebody else handles or ignores it.
    """
    received: list[int] = []
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        # `timeout` sends it twice; a second one must not disturb the cleaning up.
        elif not received:
            received.append(number)
            raise KeyboardInterrupt

    launched = "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE") or 1) > 1
    taken = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    if launched or taken or threading.current_thread() is not threading.main_thread():
        yield received
        return
    signal.signal(signal.SIGTERM, handle)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
