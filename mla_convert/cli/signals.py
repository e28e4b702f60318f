"""Makes SIGTERM end a command the way Ctrl-C does, so that no half-written file stays behind."""

from __future__ import annotations

import contextlib
import os
import signal

from ..interrupts import interrupted_by


def orderly_end() -> contextlib.AbstractContextManager[list[int]]:
    """Raise KeyboardInterrupt in the block at the first SIGTERM; yields a list that then holds its number.

    SIGTERM keeps its default action in a launcher's workers, which would otherwise wait for each other forever (except
    where they make one video, see `together`), and in forked processes. An existing handler, or SIG_IGN, is left alone.
    """
    launched = "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE") or 1) > 1
    handled = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    return interrupted_by(() if launched or handled else (signal.SIGTERM,))
