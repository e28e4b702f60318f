"""What runs now and since when: a call that does not end, or one after which the device is lost, ends the process.

A kernel that reads what it must not leaves a CUDA context that fails for ever; one that does not end leaves a host that
waits. Either is noted with the name of what ran, so that another process goes on without it.
"""

from __future__ import annotations

import threading
import time

import torch

LOST = 3
"""The exit code of a process that ended so."""
PATIENCE = 90.0
"""Seconds that one call may take, the compilation of its kernels included."""


class Lost(RuntimeError):
    """The device does not answer this process any more."""


class Now:
    """The name of what runs, since when, and by name why something must not run again."""

    def __init__(self):
        self.name, self.since, self.barred = None, time.monotonic(), {}


NOW = Now()


def mark(name=None):
    """Something goes on, or `name` begins."""
    NOW.name, NOW.since = name or NOW.name, time.monotonic()


def barred(name):
    """Why `name` must not run, None where it may; where it may, it begins."""
    if name not in NOW.barred:
        mark(name)
    return NOW.barred.get(name)


def answers(device):
    """Whether a device still answers this process."""
    if device.type != "cuda":
        return True
    try:
        # Nothing is allocated: memory that has ended is no loss of the device.
        torch.cuda.synchronize(device)
    except Exception:
        return False
    return True


def require_answer(device, error):
    """Raise Lost from `error` unless the device still answers."""
    if not answers(device):
        raise Lost(f"{NOW.name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def guard(ended, patience=PATIENCE):
    """Call `ended` in a thread of its own once nothing was marked for `patience` seconds."""

    def wait():
        while time.monotonic() - NOW.since <= patience:
            time.sleep(min(1.0, patience / 4))
        ended()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread
