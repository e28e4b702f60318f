"""Watch the current call: a process exits if a call hangs or leaves the device unusable.

An illegal memory access breaks the CUDA context for good, and a kernel that never finishes blocks the host. Both are
recorded with the name of what ran, so that another process can continue without it.
"""

from __future__ import annotations

import threading
import time

import torch

LOST = 3
"""Exit code of such a process."""
PATIENCE = 90.0
"""Seconds that one call may take, including the compilation of its kernels."""


class Lost(RuntimeError):
    """The device no longer responds to this process."""


class Now:
    """The name of the current call, its start time, and the calls that must not run again, with reasons."""

    def __init__(self):
        self.name, self.since, self.barred = None, time.monotonic(), {}


NOW = Now()


def mark(name=None):
    """Record progress of the current call or, if `name` is given, the start of a new one."""
    NOW.name, NOW.since = name or NOW.name, time.monotonic()


def barred(name):
    """Why `name` must not run; if it may, mark its start and return None."""
    if name not in NOW.barred:
        mark(name)
    return NOW.barred.get(name)


def answers(device):
    """Whether a device still responds to this process."""
    if device.type != "cuda":
        return True
    try:
        # Allocates nothing: running out of memory does not mean that the device is lost.
        torch.cuda.synchronize(device)
    except Exception:
        return False
    return True


def require_answer(device, error):
    """Raise Lost from `error` unless the device still responds."""
    if not answers(device):
        raise Lost(f"{NOW.name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def guard(ended, patience=PATIENCE):
    """Start a thread that calls `ended` once there was no `mark` for `patience` seconds."""

    def wait():
        while time.monotonic() - NOW.since <= patience:
            time.sleep(min(1.0, patience / 4))
        ended()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread
