"""Attention, a model step and a chunk at the Wan2.1-1.3B geometry, dense against latent: `python run.py --out results`.

Needs torch, triton and numpy, nothing else, and one GPU; the package `mla_attention` is taken from this folder's
neighbour. On its first launch Triton compiles a launcher in C: it needs gcc (or cc) and the headers of this Python,
Python.h. Every kernel is checked against float64 first, and no time is reported for what runs one whose check fails.
Variants are timed in turn, round by round; ratios are of medians of one run. `--budget` counts seconds from the start
of the command; parts share them, what matters most first, and name what they had to leave out. `results.json` and
`results.md` are written anew after each. `--tiny --device cpu` runs all of it at a toy size in Triton's interpreter,
for a test; its times mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

STARTED = time.monotonic()
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "torch-ext")]
if "--tiny" in sys.argv and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# FlexAttention is compiled here and not in a pool of processes, whose start would fall into what is timed.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import sections  # noqa: E402
import sizes  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
import tune  # noqa: E402
from checks import check_all, red  # noqa: E402
from dense import TORCH, Stock  # noqa: E402
from report import goals, table  # noqa: E402
from timing import Budget, ceilings, told  # noqa: E402
from wan import Shape  # noqa: E402

WAN_SIZES = [
    *((queries, 21, 1) for queries in (4680, 1560, 512, 128)),
    *((4680, frames, 1) for frames in (60, 3)),
    *((queries, 21, 4) for queries in (4680, 1560, 512, 128)),
    *((queries, frames, batch) for batch in (1, 4) for frames in (60, 3) for queries in (1560, 512, 128)),
    *((4680, frames, 4) for frames in (60, 3)),
]
"""Queries, frames of keys and batch; what matters most comes first, in case time ends."""


class Part(NamedTuple):
    """What of the seconds that are left a part may take, and how many it needs to be begun."""

    share: float
    least: float


PARTS = {
    "step": Part(0.3, 0),
    "attention": Part(0.5, 0),
    "chunk": Part(0.4, 15),
    "graph": Part(0.3, 8),
    "profile": Part(0.3, 10),
    "streams": Part(0.6, 15),
    "flex": Part(1.0, 30),
}
"""In the order in which they run."""
TINY = Shape(layers=1, heads=1, head_dim=64, ffn=32, tokens=4, window=4, chunk=1, text=4)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for results.json and results.md")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds")
    parser.add_argument("--budget", type=float, default=480, help="seconds for the whole command")
    parser.add_argument("--parts", nargs="*", choices=sorted(PARTS), default=list(PARTS), help="only these parts")
    parser.add_argument("--tiles", type=Path, help="take the tiles that tune.py found fastest and wrote to this file")
    parser.add_argument("--tiny", action="store_true", help="a toy size, to see that everything runs")
    chosen = parser.parse_args(arguments)
    if torch.device(chosen.device).type == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "error: no CUDA device; --tiny --device cpu runs a toy size in the interpreter\n")
    return chosen


def lacking(environment=os.environ):
    """What Triton needs to compile its launchers and does not find, in one line; None when it finds all."""
    missing = []
    if not environment.get("CC") and shutil.which("gcc") is None and shutil.which("cc") is None:
        missing.append("no C compiler (gcc or cc)")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        missing.append(f"no {header}")
    return f"Triton needs what is not here to launch kernels: {', '.join(missing)}" if missing else None


def describe(device, dtype, shape, chosen):
    """Where and what: device, versions and sizes."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "device": properties.name if properties else f"CPU ({platform.machine()})",
        "memory_gb": properties.total_memory / 1e9 if properties else None,
        "multiprocessors": properties.multi_processor_count if properties else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton.__version__,
        "python": platform.python_version(),
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": chosen.repeats,
        "shape": dataclasses.asdict(shape),
        "tiny": chosen.tiny,
    }


def main(arguments=None, started=None):
    """Measure and write; 0 when everything ran and every check passed, else 1."""
    started = time.monotonic() if started is None else started
    chosen = parse(arguments)
    budget, repeats, device = Budget(chosen.budget, started), chosen.repeats, torch.device(chosen.device)
    if device.type == "cuda":
        if device.index is not None:
            # Events and streams are those of the current device.
            torch.cuda.set_device(device)
        if reason := lacking():
            print(reason, file=sys.stderr)
    dtype, shape, wanted = torch.bfloat16, Shape(), WAN_SIZES
    if chosen.tiny:
        # The interpreter's products of bfloat16 are wrong.
        dtype, repeats, shape, wanted = torch.float32, 1, TINY, [(TINY.queries, 2, 1)]
    torch.manual_seed(0)
    shipped = tune.tables()
    tiles = []
    try:
        tiles = tune.use(chosen.tiles) if chosen.tiles else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # It may have entered some of them.
        tune.restore(shipped)
        print(f"warning: the tiles of {chosen.tiles} are not taken: {told(error)}", file=sys.stderr)
    chosen.out.mkdir(parents=True, exist_ok=True)
    result = {**describe(device, dtype, shape, chosen), "tiles": tiles}
    result["seconds"] = {"start": time.monotonic() - started}

    def save(part, found):
        result[part] = found
        result["goals"] = goals(result)
        write(chosen.out / "results.json", json.dumps(result, indent=2) + "\n")
        write(chosen.out / "results.md", table(result))

    def measure(part, work):
        """The result of a part, saved with the time it took; what it had saved before it failed stays."""
        print(f"{part}: {budget.left():.0f} s left", file=sys.stderr)
        began = time.monotonic()
        try:
            found = work()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        except Exception as error:
            # The other parts are worth having all the same.
            found = {**(result.get(part) or {}), "failed": told(error)}
            print(f"{part}: {found['failed']}", file=sys.stderr)
        result["seconds"][part] = time.monotonic() - began
        save(part, found)

    def check_tables():
        """What `check_all` finds; tiles of a file with which it fails are refused, and the package's are checked."""
        if not tiles:
            return check_all(device, dtype)
        try:
            failures = check_all(device, dtype)
        except Exception as error:
            failures = [told(error)]
        if not failures:
            return failures
        tune.restore(shipped)
        result.update(tiles=[], tiles_refused={"tiles": tiles, "failures": failures})
        print(f"the tiles of {chosen.tiles} are refused: {'; '.join(failures)}", file=sys.stderr)
        return check_all(device, dtype)

    with torch.no_grad():
        measure("checks", lambda: {"failures": check_tables()})
        failures = result["checks"].get("failures")
        print("\n".join(failures or ["all kernels agree with float64"] * (failures == [])), file=sys.stderr)
        # Without an answer nothing is known to be right.
        wrong = sections.OPS if failures is None else red(failures)
        measure("ceilings", lambda: ceilings(device, dtype, *((64, 1, 1) if chosen.tiny else ())))
        run = Stock(TORCH, shape.head_dim**-0.5)

        def stock():
            nonlocal run
            run, found = sections.best_dense(shape, device, dtype, repeats, budget.part(0.1))
            return found

        measure("stock", stock)
        one, several = (shape, device, dtype, repeats), max(1, repeats // 3)
        works = {
            "step": lambda left: sections.model_step(*one, left, run, wrong),
            "attention": lambda left: sizes.attention(*one, left, wanted, lambda rows: save("attention", rows), wrong),
            "chunk": lambda left: sections.chunk(
                shape, device, dtype, several, left, run, 2 if chosen.tiny else 5, wrong
            ),
            "graph": lambda left: sections.graph_step(*one, left, run, wrong),
            "profile": lambda left: sections.profile(shape, device, dtype, run, wrong),
            "streams": lambda left: sections.streams(shape, device, dtype, left),
            "flex": lambda left: sizes.flex(*one, left, wanted, lambda rows: save("flex", rows), wrong),
        }
        for part, (share, least) in PARTS.items():
            if part not in chosen.parts:
                continue
            if budget.left() <= (0 if chosen.tiny else least):
                save(part, {"left_out": ["all of it: no time was left"]})
                continue
            measure(part, lambda part=part, share=share: works[part](budget.part(share)))
    result["seconds"]["all"] = time.monotonic() - started
    save("finished", True)
    print(table(result))
    return int(bool(failures) or any("failed" in found for found in result.values() if isinstance(found, dict)))


def write(path, text):
    """A file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main(started=STARTED))
