"""Interleaved timing, on a GPU by events, launched or as CUDA graphs; the device's rates; a budget of seconds."""

from __future__ import annotations

import contextlib
import math
import re
import statistics
import time

import torch
from watch import barred, mark, require_answer

LEAST_MS = 2.0
"""A timed stretch is at least this long: shorter calls are repeated within it."""
MOST_CALLS = 200
LEAST_ROUNDS = 3
FULL = re.compile("out of memory|ALLOC_FAILED|NOT_INITIALIZED", re.IGNORECASE)
"""What torch, cuBLAS, cuDNN and Triton say where memory ends, by exceptions of several types."""


class Budget:
    """Seconds that are left for a part of the benchmark, from now on or from a `started` of `time.monotonic`."""

    def __init__(self, seconds, started=None):
        self.end = (time.monotonic() if started is None else started) + seconds

    def left(self):
        return self.end - time.monotonic()

    def part(self, share):
        """A budget of its own, a share of what is left."""
        return Budget(max(0.0, share * self.left()))


def told(error):
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def does_not_fit(error):
    """Whether an exception says that memory has ended."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and FULL.search(str(error)) is not None
    )


def runnable(variants, device):
    """Those of `variants` that run, once each, which compiles them, and by name why others do not."""
    found, refused = {}, {}
    for name, run in variants.items():
        if reason := barred(name):
            refused[name] = reason
            continue
        try:
            once(run, device)
            found[name] = run
        except Exception as error:
            require_answer(device, error)
            refused[name] = told(error)
    return found, refused


def graphs(variants, device):
    """Variants as replays of CUDA graphs, by name, and why others cannot be captured; none on a CPU.

    They share a stream and memory: one is replayed at a time, and none of their results is kept.
    """
    found, refused = {}, {}
    if device.type != "cuda":
        return found, refused
    capture = Capture(device)
    for name, run in variants.items():
        mark(name)
        try:
            found[name] = capture(run)[0].replay
        except Exception as error:
            refused[name] = told(error.__context__ or error)
    return found, refused


class Capture:
    """Captures functions as CUDA graphs on one side stream, in one pool of memory; answers graph and result."""

    def __init__(self, device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.failed = []

    def __call__(self, run):
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        # Around the capture, too, which leaves its stream as the current one where it fails.
        with torch.cuda.stream(self.stream):
            run()
            torch.cuda.synchronize(self.device)
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    out = run()
            except Exception:
                self._recover(graph)
                raise
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return graph, out

    def _recover(self, graph):
        """Leave torch as if the capture that failed had not begun: its allocator and its generator wait for the end."""
        self.failed.append(graph)
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(index, self.pool)
            torch._C._cuda_releasePool(index, self.pool)
        self.pool = torch.cuda.graph_pool_handle()
        with contextlib.suppress(Exception):
            # What ends with success ends the generator's capture, too.
            some = torch.zeros(1, device=self.device)
            torch.cuda.synchronize(self.device)
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream):
                some.add_(1)


def interleaved(variants, repeats, device, budget=None, each=None):
    """Milliseconds of every variant, `{name: {median_ms, min_ms, max_ms, quartiles_ms, rounds}}`.

    `variants` maps names to functions without arguments. A round times each of them once, on a GPU over so many
    calls that they take 2 ms. The first round warms up and is not counted; after `LEAST_ROUNDS` rounds an
    exhausted `budget` ends the measurement. `each` is called with what is known after every round.
    """
    calls = {}
    for name, run in variants.items():
        mark(name)
        once(run, device)
        calls[name] = 1
        if device.type == "cuda":
            calls[name] = min(MOST_CALLS, max(1, math.ceil(LEAST_MS / max(1e-3, once(run, device)))))
    times = {name: [] for name in variants}
    for round_ in range(repeats):
        if budget is not None and round_ >= LEAST_ROUNDS and budget.left() <= 0:
            break
        for name, run in variants.items():
            mark(name)
            times[name].append(once(run, device, calls[name]))
        if each is not None:
            each({name: summary(found) for name, found in times.items()})
    return {name: summary(found) for name, found in times.items()}


def both(variants, repeats, device, budget=None):
    """`interleaved` of the variants' CUDA graphs where they can be captured, else as they are launched.

    A launch from Python takes longer than what it launches where that is small. Every summary says what was timed,
    `by` graph or launch, and beside a graph's has the median of some rounds of launches, `launched_ms`.
    """
    replays, refused = graphs(variants, device)
    found = interleaved({**variants, **replays}, repeats, device, budget)
    launched = interleaved({name: variants[name] for name in replays}, min(repeats, LEAST_ROUNDS), device)
    for name, times in found.items():
        times["by"] = "graph" if name in replays else "launch"
        if name in launched:
            times["launched_ms"] = launched[name]["median_ms"]
        if name in refused:
            times["not_captured"] = refused[name]
    return found


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
