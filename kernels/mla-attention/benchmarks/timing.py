"""Interleaved timing, on a GPU by events, what the device can do at best, and a budget of seconds."""

from __future__ import annotations

import math
import statistics
import time

import torch

LEAST_MS = 2.0
"""A timed stretch is at least this long: shorter calls are repeated within it."""
MOST_CALLS = 50
LEAST_ROUNDS = 3


class Budget:
    """Seconds that are left for a part of the benchmark."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.end = time.monotonic() + seconds

    def left(self):
        return self.end - time.monotonic()

    def part(self, share):
        """A budget of its own, a share of what is left."""
        return Budget(max(0.0, share * self.left()))


def interleaved(variants, repeats, device, budget=None):
    """Milliseconds of every variant, `{name: {median_ms, min_ms, max_ms, quartiles_ms, rounds}}`.

    `variants` maps names to functions without arguments. A round times each of them once, on a GPU over so many
    calls that they take 2 ms. The first round warms up and is not counted; after `LEAST_ROUNDS` rounds an
    exhausted `budget` ends the measurement.
    """
    calls = {}
    for name, run in variants.items():
        once(run, device)
        calls[name] = 1
        if device.type == "cuda":
            calls[name] = min(MOST_CALLS, max(1, math.ceil(LEAST_MS / max(1e-3, once(run, device)))))
    times = {name: [] for name in variants}
    for round_ in range(repeats):
        if budget is not None and round_ >= LEAST_ROUNDS and budget.left() <= 0:
            break
        for name, run in variants.items():
            times[name].append(once(run, device, calls[name]))
    return {name: summary(found) for name, found in times.items()}


def summary(times):
    """Median, extremes and quartiles of some milliseconds."""
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {
        "median_ms": statistics.median(times),
        "min_ms": min(times),
        "max_ms": max(times),
        "quartiles_ms": [low, high],
        "rounds": len(times),
    }


def once(run, device, calls=1):
    """Milliseconds of one call, the mean of `calls`."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(calls):
            run()
        return 1e3 * (time.perf_counter() - started) / calls
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(calls):
        run()
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop) / calls


def ceilings(device, dtype, size=8192, megabytes=1024, repeats=10):
    """Measured rates: `copy_tb_s`, bytes read and written a second, and `matmul_tflop_s` of a square product."""
    source = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    found = interleaved(
        {"copy": lambda: target.copy_(source), "matmul": lambda: torch.matmul(a, b, out=out)}, repeats, device
    )
    return {
        "copy_tb_s": 2 * source.numel() / found["copy"]["median_ms"] / 1e9,
        "matmul_tflop_s": 2 * size**3 / found["matmul"]["median_ms"] / 1e9,
        "times": found,
    }
