"""Wait for work of other processes by polling.

A barrier would time out, and would fail when a process dies; so polling checks for that itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from ..errors import UserError

_POLL_SECONDS = 0.5


def wait_until(done: Callable[[], bool]) -> None:
    """Return when `done` says so. Raises UserError when the machine where the processes meet is gone."""
    while not done():
        if dist.is_initialized():
            try:
                _get_default_store().check(["any"])
            except (RuntimeError, dist.DistError):
                raise UserError("the first process of the run is gone; its own message says why") from None
        time.sleep(_POLL_SECONDS)
