"""Waits for work of other processes by polling, and passes notices between the processes of a launch.

A barrier would time out on long work. Polling therefore also checks that no process has failed, which a launcher may
not tell the other machines, and that the first one is still alive. A process that dies of SIGKILL leaves no notice: its
launcher ends the others of its machine, within half a minute, and `srun --kill-on-bad-exit` those of other machines.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from ..errors import UserError
from .requests import Stopped
from .sharding import from_main

_POLL_SECONDS = 0.5
_LONGEST = 10
"""How many times longer the pause between two looks at files becomes."""
_FAREWELL_SECONDS = 6
"""How long the first process stays for the others, a little more than their longest pause between two looks."""
_FAILED = "failed"
_LEFT = "left"

Result = TypeVar("Result")


class Notices:
    """What the processes of a launch have told each other about one run, in the launch's own store.

    A later launch has another store, and `run` tells one run of a launch from another. Without other processes nobody
    is told.
    """

    def __init__(self, run: object) -> None:
        self.run = run
        self._led: Counter[str] = Counter()

    def tell(self, what: str, content: str = "") -> None:
        """Make `what` known, with `content`."""
        store = _store()
        if store is not None:
            store.set(self._key(what), content)

    @classmethod
    def of_run(cls) -> Notices:
        """Those of a run that begins now; every process of the launch calls this."""
        return cls(from_main(time.time_ns()))

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Make known which process has failed if the block raises; the first that failed is kept."""
        try:
            yield
        except BaseException as error:
            # The store may be gone with the process that has it.
            with contextlib.suppress(RuntimeError, dist.DistError):
                store = _store()
                if store is not None:
                    self._leave(store, stopped=isinstance(error, Stopped))
            raise

    def _leave(self, store: dist.Store, stopped: bool) -> None:
        """Say why this process ends, unless another has; the first one, which has the store, waits until all know."""
        rank, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if not store.check([self._key(_FAILED)]):
            who = f"process {rank}" if rank else "the first process"
            self.tell(_FAILED, "" if stopped else who)
        left, deadline = store.add(self._key(_LEFT), 1), time.monotonic() + _FAREWELL_SECONDS
        while rank == 0 and left < count and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS / 10)
            left = store.add(self._key(_LEFT), 0)

    def check(self) -> None:
        """Raise UserError if a process has failed or the store's is gone, Stopped if the first one has stopped."""
        store = _store()
        if store is None:
            return
        try:
            failed = store.check([self._key(_FAILED)])
            who = bytes(store.get(self._key(_FAILED))).decode() if failed else ""
        except (RuntimeError, dist.DistError):
            raise _ended() from None
        if failed:
            raise UserError(f"{who} of the run failed; see its error message") if who else Stopped

    def wait_for_end(self) -> None:
        """Return once a process has failed or stopped, or the first one is gone."""

        def ended() -> bool:
            self.check()
            return _store() is None

        with contextlib.suppress(UserError):
            wait_until(ended)

    def wait(self, what: str) -> str:
        """The content of `what` once it is told. Raises UserError if a process failed or the first is gone."""
        store = _store()
        assert store is not None

        def told() -> bool:
            self.check()
            return bool(store.check([self._key(what)]))

        try:
            wait_until(told)
            return bytes(store.get(self._key(what))).decode()
        except (RuntimeError, dist.DistError):
            raise _ended() from None

    def led(self, what: str, main: bool, action: Callable[[], Result]) -> Result | None:
        """`action()` in the first process, `main`; the others return None once it is through.

        What may fail in the first process alone is done so ahead of a collective, in which the others would wait for
        an hour. All processes call this in the same order. Raises UserError as `wait` does.
        """
        self._led[what] += 1
        through = f"{what}/{self._led[what]}"
        if main:
            result = action()
            self.tell(through)
            return result
        if _store() is not None:
            self.wait(through)
        return None

    def _key(self, what: str) -> str:
        return f"mla_convert/{self.run}/{what}"


def _store() -> dist.Store | None:
    """The store of the launch; None for a process alone."""
    return _get_default_store() if dist.is_initialized() else None


def wait_for_files(
    paths: Iterable[Path], notices: Notices, on_missing: Callable[[int], None] = lambda count: None
) -> None:
    """Return when all `paths` exist. After each check, `on_missing` is called with the number of missing files.

    Files that were found are not checked again, and the longer it takes, the rarer the checks become. Raises UserError
    if the rendezvous process is gone, or if the `notices` say that a process has failed.
    """
    missing = list(paths)

    def all_exist() -> bool:
        missing[:] = [path for path in missing if not path.exists()]
        if missing:
            notices.check()
            on_missing(len(missing))
        return not missing

    wait_until(all_exist, _LONGEST)


def wait_until(done: Callable[[], bool], longest: int = 1) -> None:
    """Return when `done()` is true.

    The pauses between two calls grow from half a second to `longest` times that.
    """
    pauses = 1
    while not done():
        time.sleep(_POLL_SECONDS * pauses)
        pauses = min(pauses + 1, longest)


def _ended() -> UserError:
    return UserError("the first process of the run has ended; see its error message")
