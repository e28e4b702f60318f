"""The parts of the benchmark: attention by size, the model's step and chunk, a CUDA graph, streams, a profile."""

from __future__ import annotations

import dataclasses
import functools
import sys

import mla_attention as ops
import torch
from dense import BASELINES, attend, usable
from timing import interleaved
from wan import Dense, Latent, Published, Step

PUBLISHED, TUNED, REINDEXED = "dense, published code", "dense, tuned, absolute", "dense, tuned, re-indexed"
DENSE = (PUBLISHED, TUNED, REINDEXED)
RANKS = (64, 96, 128, 192, 256)
SPLITS = (1, 2, 5)
SHARED = 32
# What the shipped recipes for published models convert to.
PAIRED = "latent 448 of two layers, rotated on read"


def attention(shape, device, dtype, repeats, budget, sizes, save):
    """Attention of one layer at `sizes` of (queries, frames of keys, batch); what time does not allow is named."""
    rows, left_out = [], []
    for queries, frames, batch in sizes:
        name = f"{queries} x {frames * shape.tokens} x {batch}"
        if budget.left() <= 0:
            left_out.append(name)
            continue
        try:
            # FlexAttention is compiled anew for every size: only where most of the work is.
            compiled = device.type == "cuda" and (queries, batch) == (shape.queries, 1)
            names = tuple(BASELINES) if compiled else tuple(BASELINES)[:2]
            rows.append(_attention_row(shape, device, dtype, repeats, budget, queries, frames, batch, names))
        except torch.cuda.OutOfMemoryError:
            left_out.append(f"{name}: out of memory")
            torch.cuda.empty_cache()
        print(f"attention {name}: {'done' if name not in left_out else 'left out'}", file=sys.stderr)
        save({"rows": rows, "left_out": left_out})
    return {"rows": rows, "left_out": left_out}


def _attention_row(shape, device, dtype, repeats, budget, count, window, batch, names):
    heads, depth, scale = shape.heads, shape.head_dim, shape.head_dim**-0.5
    keys = window * shape.tokens
    query, key, value = (torch.randn(batch, n, heads, depth, device=device, dtype=dtype) for n in (count, keys, keys))
    variants, refused = usable(query, key, value, scale, SPLITS, names)
    for splits in (0, *SPLITS):
        label = f"attend, {splits} split{'s' * (splits > 1)}" if splits else "attend, splits by rule"
        variants[label] = functools.partial(ops.attend, query, key, value, None, scale, splits)
    slots = torch.arange(window, dtype=torch.int32, device=device)
    num_keys = torch.full((1,), keys, dtype=torch.int32, device=device)
    turn = torch.zeros(keys, SHARED // 2, 2, device=device)
    turn[..., 0] = 1
    flop = dict.fromkeys(variants, 4 * batch * heads * count * keys * depth)
    for rank in RANKS:
        cached = torch.randn(batch, window, shape.tokens, rank + SHARED, device=device, dtype=dtype)
        latent = torch.randn(batch, count, heads, rank, device=device, dtype=dtype)
        pe = torch.randn(batch, count, heads, SHARED, device=device, dtype=dtype)
        up = torch.randn(heads * (depth - SHARED + depth), rank, device=device, dtype=dtype) * rank**-0.5
        bias = torch.zeros(len(up), device=device, dtype=dtype)
        name = f"absorbed, rank {rank}"
        variants[name] = functools.partial(
            ops.latent_attention, latent, pe, cached, None, slots, num_keys, turn, scale, 0
        )
        flop[name] = 2 * batch * heads * count * keys * (2 * rank + SHARED)
        name = f"expand, rank {rank}"
        # Into other memory: the attention timed beside it reads these keys and values.
        spaces = torch.empty_like(key), torch.empty_like(value)
        variants[name] = functools.partial(
            ops.expand_kv_, *spaces, cached, None, slots, num_keys, up, bias, None, None, turn, False
        )
        flop[name] = 2 * batch * keys * rank * len(up)
    found = interleaved(variants, repeats, device, budget)
    for name, times in found.items():
        times["tflop_s"] = flop[name] / times["median_ms"] / 1e9
    return {"batch": batch, "queries": count, "keys": keys, "times": found, "refused": refused}


def best_dense(shape, device, dtype, repeats, budget):
    """The fastest stock attention and number of splits at the step's size, its name and function."""
    size = (shape.batch, shape.heads, shape.head_dim)
    query, key, value = (
        torch.randn(size[0], n, *size[1:], device=device, dtype=dtype) for n in (shape.queries, shape.keys, shape.keys)
    )
    scale = shape.head_dim**-0.5
    variants, refused = usable(query, key, value, scale, SPLITS, tuple(BASELINES)[:2])
    found = interleaved(variants, repeats, device, budget)
    if not found:
        return None, None, {"times": {}, "refused": refused}
    best = min(found, key=lambda name: found[name]["median_ms"])
    name, _, splits = best.partition(", ")
    run = functools.partial(_stock, name, scale, int(splits.split()[0]))
    return best, run, {"times": found, "refused": refused}


def _stock(name, scale, splits, query, key, value):
    """Stock attention; keys that the splits do not divide are not split."""
    return attend(name, query, key, value, scale, splits if key.shape[1] % splits == 0 else 1)


def ways(shape, device, dtype, run):
    """Every way of self-attention that is compared, as functions that build it; `run` is the best stock attention."""
    build = functools.partial
    found = {
        PUBLISHED: build(Published, shape, device, dtype),
        TUNED: build(Dense, shape, device, dtype, reindexed=False, run=run),
        REINDEXED: build(Dense, shape, device, dtype, reindexed=True, run=run),
    }
    for rank in (64, 192):
        for path in ("absorbed", "expand"):
            name = f"latent {rank}+{SHARED}, {'absorbed' if path == 'absorbed' else 'expanded'}"
            found[name] = build(Latent, shape, device, dtype, rank, SHARED, path)
    for rank in (64, 192, 224):
        found[f"latent {rank}, rotated on read"] = build(Latent, shape, device, dtype, rank, 0, "expand", run=run)
        found[f"latent {rank}, rotated on read, attend"] = build(Latent, shape, device, dtype, rank, 0, "expand")
    found[PAIRED] = build(Latent, shape, device, dtype, 448, 0, "expand", run=run, together=2)
    return found


def model_step(shape, device, dtype, repeats, budget, run):
    """One pass through all layers by every way, side by side; ratios of the dense baselines over the latent ways."""
    step = Step(shape, device, dtype)
    built, refused = {}, {}
    for name, build in ways(shape, device, dtype, run).items():
        try:
            built[name] = build()
            step(built[name])
        except Exception as error:
            built.pop(name, None)
            refused[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    found = interleaved({name: functools.partial(step, way) for name, way in built.items()}, repeats, device, budget)
    sizes = {name: way.bytes() for name, way in built.items()}
    return {"times": found, "cache_bytes": sizes, "refused": refused, "ratios": ratios(found)}


def ratios(found):
    """Medians of the dense baselines over those of the latent ways."""
    medians = {name: times["median_ms"] for name, times in found.items()}
    latent = {name: median for name, median in medians.items() if name.startswith("latent")}
    return {
        base: {name: medians[base] / median for name, median in latent.items()} for base in DENSE if base in medians
    }


def chunk(shape, device, dtype, repeats, budget, run, passes=5):
    """A chunk: `passes` passes, the last of which writes the latents; histories expanded once a pass or a chunk."""
    step = Step(shape, device, dtype)
    build = functools.partial(Latent, shape, device, dtype)
    built = {
        PUBLISHED: Published(shape, device, dtype),
        TUNED: Dense(shape, device, dtype, reindexed=False, run=run),
        REINDEXED: Dense(shape, device, dtype, reindexed=True, run=run),
        f"latent 192+{SHARED}, expanded": build(192, SHARED, "expand"),
        f"latent 64+{SHARED}, absorbed": build(64, SHARED, "absorbed"),
        "latent 192, rotated on read": build(192, 0, "expand", run=run),
        "latent 192, rotated on read, history kept": build(192, 0, "expand", run=run, keep=True),
        PAIRED: build(448, 0, "expand", run=run, together=2),
    }

    def passed(way):
        way.start_chunk()
        for _ in range(passes):
            out = step(way)
        if isinstance(way, Latent):
            for layer, block in enumerate(step.blocks):
                key, value = (torch.nn.functional.linear(out, weight) for weight in block["qkv"][1:])
                way.write(layer, key, value)

    found = interleaved({name: functools.partial(passed, way) for name, way in built.items()}, repeats, device, budget)
    return {"times": found, "ratios": ratios(found), "passes": passes}


def graph_step(shape, device, dtype, repeats, budget, run):
    """A pass of a latent way captured in a CUDA graph, against the same pass launched from Python."""
    if device.type != "cuda":
        return None
    step, way = Step(shape, device, dtype), Latent(shape, device, dtype, 192, 0, "expand", run=run)
    expected = step(way)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(way)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(way)
    graph.replay()
    torch.cuda.synchronize(device)
    difference = float((out.float() - expected.float()).abs().max() / expected.float().abs().max())
    variants = {"launched": functools.partial(step, way), "graph": graph.replay}
    return {"times": interleaved(variants, repeats, device, budget), "error": difference}


def profile(shape, device, dtype, run, most=14):
    """Where a step's time goes, by kernel in microseconds: the tuned dense path and two latent ones."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    step, found = Step(shape, device, dtype), {}
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    for name, build in ways(shape, device, dtype, run).items():
        if name not in (TUNED, f"latent 64+{SHARED}, absorbed", "latent 192, rotated on read"):
            continue
        way = build()
        step(way)
        with profiler(activities=[activity]) as recorded:
            step(way)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        kernels = []
        for event in recorded.key_averages():
            device_time = getattr(event, "self_device_time_total", 0) or getattr(event, "self_cuda_time_total", 0)
            spent = device_time if device.type == "cuda" else event.self_cpu_time_total
            kernels.append({"name": event.key[:120], "us": float(spent), "calls": event.count})
        found[name] = sorted(kernels, key=lambda kernel: -kernel["us"])[:most]
    return found


def streams(shape, device, dtype, budget):
    """How many streams of one more pass fit: the batch is raised until memory ends, dense and latent."""
    if device.type != "cuda":
        return None
    found, left_out = {}, []
    builders = {
        "latent 192, rotated on read": lambda s: Latent(s, device, dtype, 192, 0, "expand", run=None),
        f"latent 192+{SHARED}, absorbed": lambda s: Latent(s, device, dtype, 192, SHARED, "absorbed"),
        PAIRED: lambda s: Latent(s, device, dtype, 448, 0, "expand", run=None, together=2),
        TUNED: lambda s: Dense(s, device, dtype, reindexed=False),
    }
    for name, build in builders.items():
        low, high = 0, 8
        while budget.left() > 0 and _fits(dataclasses.replace(shape, batch=high), build, device, dtype):
            low, high = high, 2 * high
        while high - low > 1 and budget.left() > 0:
            middle = (low + high) // 2
            fits = _fits(dataclasses.replace(shape, batch=middle), build, device, dtype)
            low, high = (middle, high) if fits else (low, middle)
        if high - low > 1:
            left_out.append(f"{name}: time ended between {low} and {high}")
        found[name] = low
        print(f"streams, {name}: {low}", file=sys.stderr)
    return {"streams": found, "left_out": left_out}


def _fits(shape, build, device, dtype):
    step = way = None
    try:
        step, way = Step(shape, device, dtype), build(shape)
        step(way)
        torch.cuda.synchronize(device)
        return True
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        step = way = None
        torch.cuda.empty_cache()
