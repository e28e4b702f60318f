"""Attention, a model step and a chunk at the Wan2.1-1.3B geometry, dense against latent: `python run.py --out results`.

Needs torch, triton and numpy, nothing else, and one GPU; the package `mla_attention` is taken from this folder's
neighbour. Every kernel is checked against float64 first, and no time is reported when a check fails. Variants are
timed in turn, round by round; ratios are of medians of one run. Parts share a budget of seconds (`--budget`) and
name what they had to leave out; `results.json` and `results.md` are written anew after each. `--tiny --device cpu`
runs all of it at a toy size in Triton's interpreter, for a test; its times mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "torch-ext")]
if "--tiny" in sys.argv and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import sections  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
import tune  # noqa: E402
from checks import check_all  # noqa: E402
from report import goals, table  # noqa: E402
from timing import Budget, ceilings  # noqa: E402
from wan import Shape  # noqa: E402

WAN_SIZES = [
    *((queries, 21, 1) for queries in (4680, 1560, 512, 128)),
    *((4680, frames, 1) for frames in (60, 3)),
    *((queries, 21, 4) for queries in (4680, 1560, 512, 128)),
    *((queries, frames, batch) for batch in (1, 4) for frames in (60, 3) for queries in (1560, 512, 128)),
    *((4680, frames, 4) for frames in (60, 3)),
]
"""Queries, frames of keys and batch; what matters most comes first, in case time ends."""
SHARES = {"step": 0.25, "chunk": 0.25, "graph": 0.1, "profile": 0.1, "streams": 0.35, "attention": 1.0}
"""Of the seconds that are left when a part begins."""
TINY = Shape(layers=1, heads=1, head_dim=64, ffn=32, tokens=4, window=4, chunk=1, text=4)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for results.json and results.md")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds")
    parser.add_argument("--budget", type=float, default=480, help="seconds for all parts together")
    parser.add_argument("--parts", nargs="*", choices=sorted(SHARES), default=list(SHARES), help="only these parts")
    parser.add_argument("--tiles", type=Path, help="take the tiles that tune.py found fastest and wrote to this file")
    parser.add_argument("--tiny", action="store_true", help="a toy size, to see that everything runs")
    chosen = parser.parse_args(arguments)
    if torch.device(chosen.device).type == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "error: no CUDA device; --tiny --device cpu runs a toy size in the interpreter\n")
    return parser, chosen


def describe(device, dtype, shape, chosen):
    """Where and what: device, versions and sizes."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "device": properties.name if properties else f"CPU ({platform.machine()})",
        "memory_gb": properties.total_memory / 1e9 if properties else None,
        "multiprocessors": properties.multi_processor_count if properties else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": chosen.repeats,
        "shape": dataclasses.asdict(shape),
        "tiny": chosen.tiny,
    }


def main(arguments=None):
    parser, chosen = parse(arguments)
    device = torch.device(chosen.device)
    if device.type == "cuda" and device.index is not None:
        # Events and streams are those of the current device.
        torch.cuda.set_device(device)
    dtype, shape, sizes = torch.bfloat16, Shape(), WAN_SIZES
    if chosen.tiny:
        # The interpreter's products of bfloat16 are wrong.
        dtype, chosen.repeats, shape, sizes = torch.float32, 1, TINY, [(TINY.queries, 2, 1)]
    torch.manual_seed(0)
    tiles = tune.use(chosen.tiles) if chosen.tiles else []
    failures = check_all(device, dtype)
    if failures:
        parser.exit(1, "error: no times are reported, these checks failed:\n" + "\n".join(failures) + "\n")
    print("all kernels agree with float64", file=sys.stderr)
    chosen.out.mkdir(parents=True, exist_ok=True)
    result = {**describe(device, dtype, shape, chosen), "tiles": tiles}
    budget, repeats = Budget(chosen.budget), chosen.repeats

    def save(part, found):
        result[part] = found
        result["goals"] = goals(result)
        write(chosen.out / "results.json", json.dumps(result, indent=2) + "\n")
        write(chosen.out / "results.md", table(result))

    with torch.no_grad():
        save("ceilings", ceilings(device, dtype, *((64, 1, 1) if chosen.tiny else ())))
        best, run, found = sections.best_dense(shape, device, dtype, repeats, budget.part(0.1))
        save("stock", {"best": best, **found})
        parts = {
            "step": lambda left: sections.model_step(shape, device, dtype, repeats, left, run),
            "chunk": lambda left: sections.chunk(
                shape, device, dtype, max(1, repeats // 3), left, run, passes=2 if chosen.tiny else 5
            ),
            "graph": lambda left: sections.graph_step(shape, device, dtype, repeats, left, run),
            "profile": lambda left: sections.profile(shape, device, dtype, run),
            "streams": lambda left: sections.streams(shape, device, dtype, left),
            "attention": lambda left: sections.attention(
                shape, device, dtype, repeats, left, sizes, lambda rows: save("attention", rows)
            ),
        }
        for part in (name for name in parts if name in chosen.parts):
            print(f"{part}: {budget.left():.0f} s left", file=sys.stderr)
            try:
                save(part, parts[part](budget.part(SHARES[part])))
            except Exception as error:
                # The other parts are worth having all the same.
                save(part, {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print(table(result))
    return int(any("failed" in found for found in result.values() if isinstance(found, dict)))


def write(path, text):
    """A file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
