"""Wait for work of other processes by polling.

A barrier would time out, and would fail when a process dies; so polling checks for that itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from ..errors import UserError

_POLL_SECONDS = 0.5


def wait_for_files(paths: Iterable[Path], told: Callable[[int], None] = lambda missing: None) -> None:
    """Return when all `paths` exist. What is there is not looked at again; `told` hears how many are missing.

    Raises UserError when the machine where the processes meet is gone.
    """
    missing = list(paths)

    def all_exist() -> bool:
        missing[:] = [path for path in missing if not path.exists()]
        if missing:
            told(len(missing))
        return not missing

    wait_until(all_exist)


def wait_until(done: Callable[[], bool]) -> None:
    """Return when `done` says so. Raises UserError when the machine where the processes meet is gone."""
    while not done():
        if dist.is_initialized():
            try:
                _get_default_store().check(["any"])
            except (RuntimeError, dist.DistError):
                raise UserError("the first process of the run is gone; its own message says why") from None
        time.sleep(_POLL_SECONDS)
