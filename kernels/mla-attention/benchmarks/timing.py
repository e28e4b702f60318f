"""Interleaved timing by CUDA events, of launches or CUDA graphs; measured device rates; a budget of seconds."""

from __future__ import annotations

import contextlib
import math
import re
import statistics
import time

import torch
from watch import barred, mark, require_answer

LEAST_MS = 2.0
"""Minimum length of a timed interval; shorter calls are repeated within it."""
MOST_CALLS = 200
LEAST_ROUNDS = 3
FULL = re.compile("out of memory|ALLOC_FAILED|NOT_INITIALIZED", re.IGNORECASE)
"""Out-of-memory messages of torch, cuBLAS, cuDNN and Triton, which come as exceptions of several types."""


class Budget:
    """Seconds left for a part of the benchmark, counted from now or from `started`, a value of `time.monotonic`."""

    def __init__(self, seconds, started=None):
        self.end = (time.monotonic() if started is None else started) + seconds

    def left(self):
        return self.end - time.monotonic()

    def part(self, share):
        """A separate budget with a share of the time left."""
        return Budget(max(0.0, share * self.left()))


def told(error):
    """An exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def does_not_fit(error):
    """Whether an exception means out of memory."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and FULL.search(str(error)) is not None
    )


def runnable(variants, device):
    """The `variants` that run, called once to compile them, and the reasons why others do not, by name."""
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
    """Variants as replays of CUDA graphs, by name, and the reasons why others cannot be captured; none on a CPU.

    They share a stream and memory: only one is replayed at a time, and their results are not kept.
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
    """Captures functions as CUDA graphs on one side stream and memory pool; returns the graph and its result."""

    def __init__(self, device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.failed = []

    def __call__(self, run):
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        # Enter the stream here too: a failed capture leaves its stream as the current one.
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
        """Reset torch after a failed capture: its allocator and generator still expect the end of the capture."""
        self.failed.append(graph)
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(index, self.pool)
            torch._C._cuda_releasePool(index, self.pool)
        self.pool = torch.cuda.graph_pool_handle()
        with contextlib.suppress(Exception):
            # A successful capture also ends the one that the generator still expects.
            some = torch.zeros(1, device=self.device)
            torch.cuda.synchronize(self.device)
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self.stream):
                some.add_(1)


def interleaved(variants, repeats, device, budget=None, each=None):
    """Milliseconds of every variant, `{name: {median_ms, min_ms, max_ms, quartiles_ms, rounds}}`.

    `variants` maps names to functions without arguments. A round times each of them once; on a GPU it repeats calls
    for 2 ms. The first round is a warm-up and does not count. After `LEAST_ROUNDS` rounds, an exhausted `budget` ends
    the measurement. `each` is called with the results so far after every round.
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
    """`interleaved` of the variants' CUDA graphs, or of their launches if they cannot be captured.

    For small work, a launch from Python takes longer than the work itself. `by` in every summary says which was timed,
    graph or launch. With a graph, `launched_ms` is the median of a few rounds of launches.
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
    """Median, extremes and quartiles of a list of milliseconds."""
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {
        "median_ms": statistics.median(times),
        "min_ms": min(times),
        "max_ms": max(times),
        "quartiles_ms": [low, high],
        "rounds": len(times),
    }


def once(run, device, calls=1):
    """Milliseconds per call, the mean of `calls`."""
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
    """Measured rates: `copy_tb_s` (bytes read plus written per second) and `matmul_tflop_s` of a square product."""
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
