"""Waits for work of other processes by polling, and passes notices of the first process to the others.

A barrier would time out on long work. Polling therefore also checks that the first process is still alive.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from ..errors import UserError

_POLL_SECONDS = 0.5
_LONGEST = 10
"""How many times longer the pause between two looks at files becomes."""
_FAILED = "failed"


class Notices:
    """What the first process of a launch has told the others about one run, in the launch's own store.

    A later launch has another store, and `run` tells one run of a launch from another. Without other processes nobody
    is told.
    """

    def __init__(self, run: object) -> None:
        self.run = run

    def tell(self, what: str, content: str = "") -> None:
        """Make `what` known, with `content`."""
        store = _store()
        if store is not None:
            store.set(self._key(what), content)

    def fail(self) -> None:
        """Make known that the first process has failed."""
        self.tell(_FAILED)

    def wait(self, what: str) -> str:
        """Return the content of `what` once it is told. Raises UserError if the first process failed or is gone."""
        store = _store()
        assert store is not None

        def told() -> bool:
            if store.check([self._key(_FAILED)]):
                raise UserError("the first process of the run failed; see its error message")
            return bool(store.check([self._key(what)]))

        try:
            wait_until(told)
            return bytes(store.get(self._key(what))).decode()
        except (RuntimeError, dist.DistError):
            raise _ended() from None

    def _key(self, what: str) -> str:
        return f"mla_convert/{self.run}/{what}"


def _store() -> dist.Store | None:
    """The store of the launch; None for a process alone."""
    return _get_default_store() if dist.is_initialized() else None


def wait_for_files(paths: Iterable[Path], on_missing: Callable[[int], None] = lambda count: None) -> None:
    """Return when all `paths` exist. After each check, `on_missing` is called with the number of missing files.

    Files that were found are not checked again, and the longer it takes, the rarer the checks become. Raises UserError
    if the rendezvous process is gone.
    """
    missing = list(paths)

    def all_exist() -> bool:
        missing[:] = [path for path in missing if not path.exists()]
        if missing:
            on_missing(len(missing))
        return not missing

    wait_until(all_exist, _LONGEST)


def wait_until(done: Callable[[], bool], longest: int = 1) -> None:
    """Return when `done()` is true. Raises UserError if the rendezvous process is gone.

    The pauses between two calls grow from half a second to `longest` times that.
    """
    pauses = 1
    while not done():
        if dist.is_initialized():
            try:
                _get_default_store().check(["any"])
            except (RuntimeError, dist.DistError):
                raise _ended() from None
        time.sleep(_POLL_SECONDS * pauses)
        pauses = min(pauses + 1, longest)


def _ended() -> UserError:
    return UserError("the first process of the run has ended; see its error message")
