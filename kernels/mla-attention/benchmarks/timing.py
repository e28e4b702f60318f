"""Interleaved timing, on a GPU by events, and what the device can do at best."""

from __future__ import annotations

import statistics
import time

import torch


def interleaved(variants, repeats, device):
    """Milliseconds of every variant, `{name: {median_ms, min_ms, max_ms}}`; a round runs each of them once.

    `variants` maps names to functions without arguments. The first round warms up and is not counted.
    """
    times = {name: [] for name in variants}
    for round_ in range(repeats + 1):
        for name, run in variants.items():
            elapsed = once(run, device)
            if round_:
                times[name].append(elapsed)
    return {
        name: {"median_ms": statistics.median(found), "min_ms": min(found), "max_ms": max(found)}
        for name, found in times.items()
    }


def once(run, device):
    """Milliseconds of one call."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - started)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop)


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
