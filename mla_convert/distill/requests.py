"""Handles requests during a run: signals that stop it, in a stage or outside, and checkpoints due by the clock."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

from ..errors import UserError
from ..interrupts import TERMINATED, interrupted_by, restore
from .launch import world_size

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def leave_signals_to_parent(worker: int) -> None:
    """Ignore in a data worker what asks its parent to stop; torch ends the workers of a parent that is done or gone.

    A launcher or a terminal signals the whole process group, and torch fails the step of a parent whose worker dies.
    """
    for number in (*SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class Stopped(UserError):
    """Raised when a signal has ended a stage early, after its checkpoint was written, or a run outside of its stages.

    It has no message in the other processes of a launch, since the first one says it.
    """

    exit_code = TERMINATED


@contextlib.contextmanager
def stopping_at_once(main: bool) -> Iterator[None]:
    """Inside the context, a signal ends the work of the first process, `main`, unless `Requests` waits for it.

    Raises Stopped. The other processes of a launch leave SIGUSR1 to the first one: a launcher ends all of them once one
    has ended. It does so by SIGTERM, which may therefore mean that a process has failed and keeps its action in a
    launch.
    """
    numbers = SIGNALS if world_size() == 1 else (signal.SIGUSR1,)
    with interrupted_by(numbers, ignored=not main) as received:
        try:
            yield
        except KeyboardInterrupt:
            if received:
                raise Stopped("a signal stopped the run; continue with the same command and --resume") from None
            raise


class Requests:
    """Inside the context, SIGTERM or SIGUSR1 in any process requests a stop at the end of the step.

    Schedulers send these signals some time before they kill (`sbatch --signal=USR1@600`). A checkpoint is due
    `minutes` after the previous one, by the clock of the first process; None disables this.
    """

    def __init__(self, accelerator: Accelerator, minutes: float | None) -> None:
        self.accelerator, self.minutes = accelerator, minutes
        self.stop = False
        self._number = 0
        self._owner, self._before = os.getpid(), dict[int, Any]()
        self.saved()

    def saved(self) -> None:
        """Record that a checkpoint was just written."""
        self._last = time.monotonic()

    def agreed(self) -> tuple[bool, bool]:
        """Whether any process should stop, and whether a checkpoint is due; the same answer in every process."""
        main, minutes = self.accelerator.is_main_process, self.minutes
        due = main and minutes is not None and time.monotonic() - self._last >= 60 * minutes
        if self.accelerator.num_processes == 1:
            return self.stop, due
        own = torch.tensor([self.stop, due], dtype=torch.float32, device=self.accelerator.device)
        stop, save = (self.accelerator.reduce(own, "sum") > 0).tolist()
        return stop, save

    def stopping(self) -> bool:
        """Whether any process should stop; the same answer in every process."""
        return self.agreed()[0]

    def __enter__(self) -> Requests:
        # Python allows signal handlers only in its main thread.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        restore(self._before)
        # The stage has ended by itself: the signal came after its last step, during the checkpoint.
        if self.stop and kind is None:
            signal.raise_signal(self._number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A forked data worker inherits this handler and must not die of it.
        if os.getpid() == self._owner:
            self.stop, self._number = True, number
