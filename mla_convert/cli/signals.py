"""Makes SIGTERM end a command the way Ctrl-C does, so that no half-written file stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def orderly_end() -> Iterator[list[int]]:
    """Raise KeyboardInterrupt in the block at the first SIGTERM; yields a list that then holds its number.

    SIGTERM keeps its default action in a launcher's workers, which would otherwise wait for each other forever, and
    in forked processes. An existing handler, or SIG_IGN, is left alone.
    """
    received: list[int] = []
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        # `timeout` sends SIGTERM twice; the second one must not disturb the cleanup.
        elif not received:
            received.append(number)
            raise KeyboardInterrupt

    launched = "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE") or 1) > 1
    handled = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    if launched or handled or threading.current_thread() is not threading.main_thread():
        yield received
        return
    signal.signal(signal.SIGTERM, handle)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
