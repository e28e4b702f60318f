"""What is asked of a stage while it trains: to stop, by a signal, and for checkpoints, by the clock."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

from ..errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(UserError):
    """A stage ended early because a signal asked for it; its checkpoint is there."""

    exit_code = 128 + signal.SIGTERM


class Requests:
    """SIGTERM and SIGUSR1 inside the context ask for a stop at the end of the step, in whichever process they arrive.

    Schedulers send them some time before they kill (`sbatch --signal=USR1@600`). After `minutes` without a checkpoint,
    by the clock of the first process, one is due; None waits for ever.
    """

    def __init__(self, accelerator: Accelerator, minutes: float | None) -> None:
        self.accelerator, self.minutes = accelerator, minutes
        self.stop = False
        self._owner, self._before = os.getpid(), dict[int, Any]()
        self.saved()

    def saved(self) -> None:
        """A checkpoint was written now."""
        self._last = time.monotonic()

    def agreed(self) -> tuple[bool, bool]:
        """Whether any process was asked to stop, and whether a checkpoint is due: the same in every process."""
        main, minutes = self.accelerator.is_main_process, self.minutes
        due = main and minutes is not None and time.monotonic() - self._last >= 60 * minutes
        asked = torch.tensor([self.stop, due], dtype=torch.float32, device=self.accelerator.device)
        stop, save = (self.accelerator.reduce(asked, "sum") > 0).tolist()
        return stop, save

    def __enter__(self) -> Requests:
        # Python handles signals in its main thread alone.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._owner:
            self.stop = True
        elif number == signal.SIGTERM:
            # A worker that was forked here is ended by whoever feeds on it.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
