"""Attention and a model step at the Wan2.1-1.3B geometry, dense against latent: `python run.py --out results`.

Needs torch, triton, numpy and the package `mla_attention` on the path, nothing else, and one GPU. It
checks every kernel against float64 first and reports no time when a check fails. Variants are timed in
turn, round by round; ratios are of medians of one run. `--tiny --device cpu` runs all of it at a toy size
in Triton's interpreter, for a test; its times mean nothing. Writes `results.json` and `results.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from pathlib import Path

import mla_attention as ops
import torch
import triton
from checks import check_all
from timing import ceilings, interleaved
from wan import Dense, Latent, Published, Shape, Step

PUBLISHED, TUNED, REINDEXED = "dense, published code", "dense, tuned, absolute", "dense, tuned, re-indexed"
RANKS = (64, 96, 128, 192, 256)
SHARED = 32


def attention_sweep(shape, device, dtype, repeats, queries, frames, batches):
    """Attention of one layer by queries, keys and batch: dense with splits, expanded and absorbed latents."""
    rows = []
    for batch in batches:
        for count in queries:
            for window in frames:
                rows.append(_sweep_row(shape, device, dtype, repeats, count, window, batch))
                print(f"attention {rows[-1]['queries']} x {rows[-1]['keys']} x {batch}: done", file=sys.stderr)
    return rows


def _sweep_row(shape, device, dtype, repeats, count, window, batch):
    heads, depth, scale = shape.heads, shape.head_dim, shape.head_dim**-0.5
    keys = window * shape.tokens
    query, key, value = (torch.randn(batch, n, heads, depth, device=device, dtype=dtype) for n in (count, keys, keys))
    slots = torch.arange(window, dtype=torch.int32, device=device)
    num_keys = torch.full((1,), keys, dtype=torch.int32, device=device)
    turn = torch.zeros(keys, SHARED // 2, 2, device=device)
    turn[..., 0] = 1

    def sdpa():
        return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))

    variants = {"sdpa": sdpa}
    for splits in (1, 2, 5):
        variants[f"attend, {splits} splits"] = lambda splits=splits: ops.attend(query, key, value, None, scale, splits)
    for rank in RANKS:
        cached = torch.randn(batch, window, shape.tokens, rank + SHARED, device=device, dtype=dtype)
        latent = torch.randn(batch, count, heads, rank, device=device, dtype=dtype)
        pe = torch.randn(batch, count, heads, SHARED, device=device, dtype=dtype)
        up = torch.randn(heads * (depth - SHARED + depth), rank, device=device, dtype=dtype) * rank**-0.5
        bias = torch.zeros(len(up), device=device, dtype=dtype)
        variants[f"absorbed, rank {rank}"] = lambda c=cached, q=latent, p=pe: ops.latent_attention(
            q, p, c, None, slots, num_keys, turn, scale, 1
        )
        variants[f"expand, rank {rank}"] = lambda c=cached, w=up, b=bias: ops.expand_kv_(
            key, value, c, None, slots, num_keys, w, b, None, None, turn, False
        )
    found = interleaved(variants, repeats, device)
    flop = 4 * batch * heads * count * keys * depth
    return {
        "batch": batch,
        "queries": count,
        "keys": keys,
        "times": found,
        "sdpa_tflop_s": flop / found["sdpa"]["median_ms"] / 1e9,
    }


def ways(shape, device, dtype, splits):
    """Every way of self-attention that is compared, as functions that build it."""
    found = {
        PUBLISHED: lambda: Published(shape, device, dtype),
        TUNED: lambda: Dense(shape, device, dtype, reindexed=False),
        REINDEXED: lambda: Dense(shape, device, dtype, reindexed=True),
    }
    for rank in (64, 192):
        found[f"latent {rank}+{SHARED}, absorbed"] = lambda r=rank: Latent(
            shape, device, dtype, r, SHARED, "absorbed", splits
        )
        found[f"latent {rank}+{SHARED}, expanded"] = lambda r=rank: Latent(
            shape, device, dtype, r, SHARED, "expand", splits
        )
    found["latent 224, expanded and rotated, sdpa"] = lambda: Latent(shape, device, dtype, 224, 0, "expand")
    found["latent 224, expanded and rotated, attend"] = lambda: Latent(
        shape, device, dtype, 224, 0, "expand", splits, "attend"
    )
    return found


def model_step(shape, device, dtype, repeats, splits):
    """One pass through all layers by every way, side by side; ratios of the dense baselines over the latent ways."""
    step = Step(shape, device, dtype)
    built = {name: build() for name, build in ways(shape, device, dtype, splits).items()}
    found = interleaved({name: (lambda way=way: step(way)) for name, way in built.items()}, repeats, device)
    medians = {name: times["median_ms"] for name, times in found.items()}
    ratios = {
        base: {name: medians[base] / median for name, median in medians.items() if name.startswith("latent")}
        for base in (PUBLISHED, TUNED, REINDEXED)
    }
    return {"times": found, "cache_bytes": {name: way.bytes() for name, way in built.items()}, "ratios": ratios}


def chunk_times(shape, device, dtype, repeats, passes=5):
    """A chunk: so many passes, the last of which also writes the latents."""
    step = Step(shape, device, dtype)
    dense, latent = Dense(shape, device, dtype, reindexed=False), Latent(shape, device, dtype, 192, SHARED, "expand")

    def run(way):
        for _ in range(passes):
            out = step(way)
        if isinstance(way, Latent):
            for layer, block in enumerate(step.blocks):
                key, value = (torch.nn.functional.linear(out, weight) for weight in block["qkv"][1:])
                way.write(layer, key, value)

    return interleaved({TUNED: lambda: run(dense), "latent 192+32, expanded": lambda: run(latent)}, repeats, device)


def graph_step(shape, device, dtype, repeats, splits):
    """A pass of a latent way captured in a CUDA graph, against the same pass launched from Python."""
    if device.type != "cuda":
        return None
    step, way = Step(shape, device, dtype), Latent(shape, device, dtype, 192, SHARED, "expand", splits)
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
    difference = float((out.float() - expected.float()).abs().max() / expected.float().abs().max())
    return {
        "times": interleaved({"eager": lambda: step(way), "graph": graph.replay}, repeats, device),
        "error": difference,
    }


def streams_until_memory_ends(shape, device, dtype):
    """How many streams of one more pass fit: the batch is raised until memory ends, dense and latent."""
    if device.type != "cuda":
        return None
    found = {}
    builders = {
        TUNED: lambda s: Dense(s, device, dtype, reindexed=False),
        "latent 192+32, expanded": lambda s: Latent(s, device, dtype, 192, SHARED, "expand"),
        "latent 192+32, absorbed": lambda s: Latent(s, device, dtype, 192, SHARED, "absorbed"),
    }
    for name, build in builders.items():
        low, high = 0, 1
        while _fits(dataclasses.replace(shape, batch=high), build, device, dtype):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if _fits(dataclasses.replace(shape, batch=middle), build, device, dtype):
                low = middle
            else:
                high = middle
        found[name] = low
        print(f"streams, {name}: {low}", file=sys.stderr)
    return found


def _fits(shape, build, device, dtype):
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


def table(result):
    """The results as Markdown."""
    lines = [
        f"{result['device']}, torch {result['torch']}, triton {result['triton']}, {result['dtype']}; "
        f"medians of {result['repeats']} interleaved rounds.",
        "",
        f"Copy {result['ceilings']['copy_tb_s']:.2f} TB/s, matmul {result['ceilings']['matmul_tflop_s']:.0f} TFLOP/s.",
        "",
        "| model step | ms | range | cache of one stream |",
        "| --- | ---: | ---: | ---: |",
    ]
    step = result["step"]
    for name, times in step["times"].items():
        span = f"{times['min_ms']:.4g} to {times['max_ms']:.4g}"
        lines.append(f"| {name} | {times['median_ms']:.4g} | {span} | {step['cache_bytes'][name] / 1e9:.3f} GB |")
    lines += ["", "| queries x keys x batch | variant | ms | TFLOP/s of SDPA |", "| --- | --- | ---: | ---: |"]
    for row in result["attention"]:
        for name, times in row["times"].items():
            size = f"{row['queries']} x {row['keys']} x {row['batch']}"
            rate = f"{row['sdpa_tflop_s']:.0f}" if name == "sdpa" else ""
            lines.append(f"| {size} | {name} | {times['median_ms']:.4g} | {rate} |")
    if result["streams"]:
        lines += ["", "| streams until memory ends | |", "| --- | ---: |"]
        lines += [f"| {name} | {count} |" for name, count in result["streams"].items()]
    return "\n".join(lines) + "\n"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for results.json and results.md")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--splits", type=int, default=2, help="split-KV of our attention in the model step")
    parser.add_argument("--tiny", action="store_true", help="a toy size, to see that everything runs")
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "error: no CUDA device; --tiny --device cpu runs a toy size in the interpreter\n")
    dtype, shape, repeats = torch.bfloat16, Shape(), chosen.repeats
    queries, frames, batches = (128, 512, 1560, 4680), (3, 21, 60), (1, 4)
    if chosen.tiny:
        # The interpreter's products of bfloat16 are wrong.
        dtype, repeats = torch.float32, 1
        shape = Shape(layers=1, heads=2, head_dim=64, ffn=32, tokens=6, window=4, chunk=1, text=4)
        queries, frames, batches = (8,), (2,), (1,)

    failures = check_all(device, dtype)
    if failures:
        parser.exit(1, "error: no times are reported, these checks failed:\n" + "\n".join(failures) + "\n")
    print("all kernels agree with float64", file=sys.stderr)
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": repeats,
        "splits": chosen.splits,
        "shape": dataclasses.asdict(shape),
        "tiny": chosen.tiny,
        "ceilings": ceilings(device, dtype, *((64, 1, 1) if chosen.tiny else ())),
        "step": model_step(shape, device, dtype, repeats, chosen.splits),
        "chunk": chunk_times(shape, device, dtype, max(1, repeats // 3), 1 if chosen.tiny else 5),
        "graph": graph_step(shape, device, dtype, repeats, chosen.splits),
        "attention": attention_sweep(shape, device, dtype, repeats, queries, frames, batches),
        "streams": streams_until_memory_ends(shape, device, dtype),
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    (chosen.out / "results.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
