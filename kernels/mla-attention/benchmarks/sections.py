"""Benchmark parts that run layers of the model: step, chunk, CUDA graph and profile."""

from __future__ import annotations

import dataclasses
import functools

import fullsize
import plain
import torch
from dense import TORCH, Stock, torch_runs, usable
from report import KEPT, PAIRED, PUBLISHED, PUBLISHED_BEST, REINDEXED, SHARED, TUNED
from sizes import SPLITS, STOCK
from timing import Capture, interleaved, told
from wan import Dense, Latent, Published, Step
from watch import barred, mark, require_answer

DENSE = (PUBLISHED, PUBLISHED_BEST, TUNED, REINDEXED)
TORCH_ALONE = "dense, absolute, norm and rotation by torch"


def best_dense(shape, device, dtype, repeats, budget, splits=SPLITS):
    """Measurements of stock attention at the step's size; `best` is the label of the fastest, including its splits."""
    size = (shape.batch, shape.heads, shape.head_dim)
    query, key, value = (
        torch.randn(size[0], n, *size[1:], device=device, dtype=dtype) for n in (shape.queries, shape.keys, shape.keys)
    )
    variants, refused = usable(query, key, value, shape.head_dim**-0.5, splits, STOCK)
    calls = {name: functools.partial(stock, query, key, value) for name, stock in variants.items()}
    found = interleaved(calls, repeats, device, budget)
    # torch's own choice is one of the others, so it counts only if no other runs.
    best = min(found, key=lambda name: (name == TORCH, found[name]["median_ms"]))
    runs = torch_runs(query, key, value)
    return {"best": best, "times": found, "refused": refused, "torch_runs": runs}


def ways(shape, device, dtype, run):
    """All ways of self-attention to compare, as functions that build them; `run` is the best stock attention."""
    build = functools.partial
    found = {**published(shape, device, dtype, run), **tuned(shape, device, dtype, run)}
    for rank in (64, 192):
        for path in ("absorbed", "expand"):
            name = f"latent {rank}+{SHARED}, {'absorbed' if path == 'absorbed' else 'expanded'}"
            found[name] = build(Latent, shape, device, dtype, rank, SHARED, path)
    for rank in (64, 192, 224):
        found[f"latent {rank}, rotated on read"] = build(Latent, shape, device, dtype, rank, 0, "expand", run=run)
        found[f"latent {rank}, rotated on read, attend"] = build(Latent, shape, device, dtype, rank, 0, "expand")
    # torch's own choice returns no log-sum-exp, so it cannot be used here.
    apart = build(Latent, shape, device, dtype, apart="flash" if run is None or run.name == TORCH else run.name)
    found[f"latent 64+{SHARED}, absorbed, own chunk by stock"] = functools.partial(
        apart, rank=64, shared=SHARED, path="absorbed"
    )
    found[f"latent 192+{SHARED}, expanded, both parts by stock"] = functools.partial(
        apart, rank=192, shared=SHARED, path="expand"
    )
    found["latent 192, rotated on read, expanded ahead"] = build(
        Latent, shape, device, dtype, 192, 0, "expand", run=run, ahead=True
    )
    found[PAIRED] = build(Latent, shape, device, dtype, 448, 0, "expand", run=run, together=2)
    return found


def published(shape, device, dtype, run):
    """Self-Forcing's published code with the attention it uses on an H200, and with the best stock attention.

    It uses FlashAttention-3 only if the device name contains H100 or Hopper, and FlashAttention-2 otherwise, which is
    torch's flash attention. The best one is unsplit, like the call in that code.
    """
    best = dataclasses.replace(run, splits=1)
    return {
        PUBLISHED: functools.partial(Published, shape, device, dtype, run=Stock("flash", run.scale)),
        PUBLISHED_BEST: functools.partial(Published, shape, device, dtype, run=best),
    }


def tuned(shape, device, dtype, run):
    """Tuned dense paths: absolute positions, and re-indexed."""
    build = functools.partial(Dense, shape, device, dtype, run=run)
    return {
        TUNED: functools.partial(build, reindexed=False),
        REINDEXED: functools.partial(build, reindexed=True),
    }


def built(builders, device, red, step=None, writes=False, agree=()):
    """The ways that can be built and run a pass, by name, and the reasons why others cannot.

    A way is left out if it runs an op in `red` (ops that failed their check), also in a pass that `writes`, or if one
    of the functions in `agree` finds it wrong at full size. These return their findings, kept as `way.checked`, and an
    explanation of what is wrong.
    """
    found, refused = {}, {}
    for name, build in builders.items():
        if reason := barred(name):
            refused[name] = reason
            continue
        try:
            way = build()
            wrong = sorted(red & (way.ops | (way.writes if writes else set())))
            if wrong:
                refused[name] = f"{', '.join(wrong)} failed its check"
                continue
            if step is not None:
                step(way)
            way.checked, wrong = {}, None
            for compare in agree:
                seen, reason = compare(way)
                way.checked |= {compare.__name__: seen} if seen else {}
                wrong = wrong or reason
            if wrong:
                refused[name] = wrong
            else:
                found[name] = way
        except Exception as error:
            # Free what was built of it, so that the others have the memory.
            way = None
            require_answer(device, error)
            refused[name] = told(error)
    return found, refused


def model_step(shape, device, dtype, repeats, budget, run, save=None, red=frozenset()):
    """One pass through all layers by every way, interleaved, with ratios of the dense baselines to the latent ways.

    `save` is called with the results so far after every round.
    """
    return _step(ways(shape, device, dtype, run), shape, device, dtype, repeats, budget, save, red)


def dense_step(shape, device, dtype, repeats, budget, run, save=None):
    """`model_step` for dense ways that run no kernel of ours."""
    every = published(shape, device, dtype, run)
    every[TORCH_ALONE] = functools.partial(
        Dense, shape, device, dtype, False, dataclasses.replace(run, splits=1), kernels=plain
    )
    return _step(every, shape, device, dtype, repeats, budget, save)


def _step(builders, shape, device, dtype, repeats, budget, save=None, red=frozenset()):
    step = Step(shape, device, dtype)
    found, refused = built(builders, device, red, step, agree=[_agreement(fullsize.way_agrees, shape, device, dtype)])

    def result(times):
        return _timed(found, refused, times) | {"cache_bytes": {name: way.bytes() for name, way in found.items()}}

    calls = {name: functools.partial(step, way) for name, way in found.items()}
    each = None if save is None else lambda times: save(result(times))
    return result(interleaved(calls, repeats, device, budget, each))


def _agreement(compare, *size):
    def compared(way):
        mark()
        return compare(way, *size)

    compared.__name__ = compare.__name__
    return compared


def _timed(found, refused, times):
    attends = {name: way.attends for name, way in found.items()}
    checked = {name: way.checked for name, way in found.items() if way.checked}
    return {"times": times, "attends": attends, "refused": refused, "ratios": ratios(times), "checked": checked}


def ratios(found):
    """Medians of the dense baselines divided by those of the latent ways."""
    medians = {name: times["median_ms"] for name, times in found.items()}
    latent = {name: median for name, median in medians.items() if name.startswith("latent")}
    return {
        base: {name: medians[base] / median for name, median in latent.items()} for base in DENSE if base in medians
    }


def chunk(shape, device, dtype, repeats, budget, run, passes=5, red=frozenset()):
    """A chunk of `passes` passes, the last of which writes the latents; histories expanded per pass or per chunk."""
    step = Step(shape, device, dtype)
    build = functools.partial(Latent, shape, device, dtype)
    builders = {
        **published(shape, device, dtype, run),
        **tuned(shape, device, dtype, run),
        f"latent 192+{SHARED}, expanded": functools.partial(build, 192, SHARED, "expand"),
        f"latent 64+{SHARED}, absorbed": functools.partial(build, 64, SHARED, "absorbed"),
        "latent 192, rotated on read": functools.partial(build, 192, 0, "expand", run=run),
        KEPT: functools.partial(build, 192, 0, "expand", run=run, keep=True),
        PAIRED: functools.partial(build, 448, 0, "expand", run=run, together=2),
    }

    def passed(way):
        way.start_chunk()
        for number in range(passes):
            # Dense caches are written on every pass, as in the published code.
            way.writing = number == passes - 1
            step(way)

    agree = [_agreement(compare, shape, device, dtype) for compare in (fullsize.way_agrees, fullsize.writes_agree)]
    found, refused = built(builders, device, red, passed, writes=True, agree=agree)
    times = interleaved({name: functools.partial(passed, way) for name, way in found.items()}, repeats, device, budget)
    return _timed(found, refused, times) | {"passes": passes}


def graph_step(shape, device, dtype, repeats, budget, run, red=frozenset()):
    """A pass of a latent way replayed as a CUDA graph, compared with the same pass launched from Python."""
    if device.type != "cuda":
        return None
    step, name = Step(shape, device, dtype), "latent 192, rotated on read"
    found, refused = built({name: ways(shape, device, dtype, run)[name]}, device, red)
    if not found:
        return {"times": {}, "refused": refused}
    way = found[name]
    expected = step(way)
    graph, out = Capture(device)(functools.partial(step, way))
    graph.replay()
    torch.cuda.synchronize(device)
    difference = float((out.float() - expected.float()).abs().max() / expected.float().abs().max())
    variants = {"launched": functools.partial(step, way), "graph": graph.replay}
    return {"times": interleaved(variants, repeats, device, budget), "error": difference, "refused": refused}


def profile(shape, device, dtype, run, red=frozenset(), most=14):
    """Microseconds of a step by kernel, for two dense and two latent ways."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    step, found = Step(shape, device, dtype), {}
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    every = ways(shape, device, dtype, run)
    for name in (PUBLISHED, TUNED, f"latent 64+{SHARED}, absorbed", "latent 192, rotated on read"):
        for way in built({name: every[name]}, device, red, step)[0].values():
            mark(name)
            with profiler(activities=[activity]) as recorded:
                step(way)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            found[name] = _kernels(recorded, device)[:most]
    return found


def _kernels(recorded, device):
    """Kernels in a profiler recording, the longest first."""
    kernels = []
    for event in recorded.key_averages():
        device_time = getattr(event, "self_device_time_total", 0) or getattr(event, "self_cuda_time_total", 0)
        spent = device_time if device.type == "cuda" else event.self_cpu_time_total
        kernels.append({"name": event.key[:120], "us": float(spent), "calls": event.count})
    return sorted(kernels, key=lambda kernel: -kernel["us"])
