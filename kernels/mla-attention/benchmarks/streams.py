"""Count how many streams of a model fit in 80 GB, dense and latent, by raising the batch until memory runs out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys

import torch
from report import PAIRED, SHARED, TUNED
from timing import does_not_fit, told
from wan import Dense, Latent, Step
from watch import mark, require_answer

MEMORY = 80e9
"""Bytes to use at most, also on a GPU that has more."""
WANTED = 6
"""Goal: a latent way holds this many times as many streams as the dense one."""


def streams(shape, device, dtype, budget, fits=None):
    """How many streams fit in one more pass, dense and latent, found by raising the batch. None without a GPU.

    After the dense way, a latent way is tried first with WANTED times as many streams, and the next one if that does
    not fit. Only then are all of them searched. `streams` holds the largest number known to fit, or None if nothing is
    known. `open` holds ways whose search did not finish, each with a batch that fits and one that is not known to. For
    tests, `fits` replaces the probe of a shape and a function that builds a way.
    """
    if device.type != "cuda" and fits is None:
        return None
    fits = fits or functools.partial(_fits, device=device, dtype=dtype)
    # First the one that all others are divided by.
    builders = {
        TUNED: lambda s: Dense(s, device, dtype, reindexed=False),
        PAIRED: lambda s: Latent(s, device, dtype, 448, 0, "expand", together=2),
        "latent 192, rotated on read": lambda s: Latent(s, device, dtype, 192, 0, "expand"),
        f"latent 192+{SHARED}, absorbed": lambda s: Latent(s, device, dtype, 192, SHARED, "absorbed"),
    }
    bounds, failed = {name: [0, None] for name in builders}, {}

    def probe(name, batch):
        try:
            fit = fits(dataclasses.replace(shape, batch=batch), builders[name])
        except Exception as error:
            require_answer(device, error)
            failed[name] = f"{name}, {batch} streams: {told(error)}"
            return False
        bounds[name][not fit] = batch
        return fit

    def search(name, budget):
        low, high = bounds[name]
        while budget.left() > 0 and name not in failed and (high is None or high - low > 1):
            probe(name, max(8, 2 * low) if high is None else (low + high) // 2)
            low, high = bounds[name]
        print(f"streams, {name}: {low} to {high or 'more'}", file=sys.stderr)

    with _limited(device):
        search(TUNED, budget.part(0.5))
        dense, others = bounds[TUNED][0], [name for name in builders if name != TUNED]
        for name in others if dense else ():
            if budget.left() <= 0 or probe(name, WANTED * dense):
                break
        for number, name in enumerate(others):
            search(name, budget.part(1 / (len(others) - number)))
    open_ = {name: pair for name, pair in bounds.items() if pair[1] is None or pair[1] - pair[0] > 1}
    return {
        "streams": {name: low if low or name not in open_ else None for name, (low, _) in bounds.items()},
        "open": open_,
        "left_out": [f"{name}: the limit is between {low} and {high or 'more'}" for name, (low, high) in open_.items()],
        "gb": _memory(device) / 1e9 if device.type == "cuda" else None,
        **({"failed": "; ".join(failed.values())} if failed else {}),
    }


def _memory(device):
    return min(MEMORY, torch.cuda.get_device_properties(device).total_memory)


@contextlib.contextmanager
def _limited(device):
    """Limit the memory that this process may use on a device to MEMORY."""
    if device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    # Without a device argument this means the current device, which run.py sets; a device without an index is refused.
    torch.cuda.set_per_process_memory_fraction(min(1.0, MEMORY / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _fits(shape, build, device, dtype):
    step = way = None
    mark()
    try:
        step, way = Step(shape, device, dtype), build(shape)
        # All weights and caches are allocated; one group of layers needs as much other memory as all in turn.
        step(way, layers=2)
        torch.cuda.synchronize(device)
        return True
    except RuntimeError as error:
        if does_not_fit(error):
            return False
        raise
    finally:
        step = way = None
        torch.cuda.empty_cache()
