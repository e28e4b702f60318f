"""Waits for work of other processes by polling.

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


def wait_for_files(paths: Iterable[Path], on_missing: Callable[[int], None] = lambda count: None) -> None:
    """Return when all `paths` exist. After each check, `on_missing` is called with the number of missing files.

    Files that were found are not checked again. Raises UserError if the rendezvous process is gone.
    """
    missing = list(paths)

    def all_exist() -> bool:
        missing[:] = [path for path in missing if not path.exists()]
        if missing:
            on_missing(len(missing))
        return not missing

    wait_until(all_exist)


def wait_until(done: Callable[[], bool]) -> None:
    """Return when `done()` is true. Raises UserError if the rendezvous process is gone."""
    while not done():
        if dist.is_initialized():
            try:
                _get_default_store().check(["any"])
            except (RuntimeError, dist.DistError):
                raise UserError("the first process of the run has ended; see its error message") from None
        time.sleep(_POLL_SECONDS)
