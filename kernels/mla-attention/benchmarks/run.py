"""Benchmark attention, a model step and a chunk at the Wan2.1-1.3B geometry, dense against latent.

Run `python run.py --out results`. It needs only torch, triton, numpy and one GPU, and imports `mla_attention` from the
neighboring folder. Triton compiles a launcher in C on the first launch, so it needs gcc or clang and Python.h of this
Python. Work that uses no kernel of ours is measured first. Then every kernel is checked against float64, and candidate
tiles are measured by `tune.py`, both in other processes. No time is reported for anything that uses a kernel whose
check failed. Variants are timed in turn, round by round; ratios are of medians of one run. `--budget` counts seconds
from the start of the command; the parts share it, those that decide a goal first, and report what they left out.
`results.json` and `results.md` are rewritten after each part. If the device stops responding or a call hangs, that is
recorded and this process exits with code 3; the next one continues with `--resume`, without the call that failed.
`--tiny --device cpu` runs everything at a toy size in Triton's interpreter, as a test; its times mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import NamedTuple

STARTED = time.monotonic()
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "torch-ext")]
if "--tiny" in sys.argv and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Compile FlexAttention in this process: starting a pool of compile processes would disturb the timing.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import processes  # noqa: E402
import sections  # noqa: E402
import sizes  # noqa: E402
import streams  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
import tune  # noqa: E402
import watch  # noqa: E402
from checks import CHECKS, check_all, isolated, red  # noqa: E402
from dense import TORCH, Stock  # noqa: E402
from mla_attention import lacking  # noqa: E402
from record import Record  # noqa: E402
from report import table  # noqa: E402
from timing import Budget, ceilings, told  # noqa: E402
from wan import Shape  # noqa: E402

WAN_SIZES = [
    *((queries, 21, 1) for queries in (4680, 1560, 512, 128)),
    *((4680, frames, 1) for frames in (60, 3)),
    *((queries, 21, 4) for queries in (4680, 1560, 512, 128)),
    *((queries, frames, batch) for batch in (1, 4) for frames in (60, 3) for queries in (1560, 512, 128)),
    *((4680, frames, 4) for frames in (60, 3)),
]
"""Queries, frames of keys and batch; the most important first, in case time runs out."""


class Part(NamedTuple):
    """The share of the remaining seconds that a part may use, and the least it needs to start."""

    share: float
    least: float


PARTS = {
    "dense": Part(0.1, 0),
    "tune": Part(0.2, 60),
    "step": Part(0.3, 0),
    "streams": Part(0.3, 20),
    "attention": Part(0.3, 0),
    "chunk": Part(0.3, 15),
    "profile": Part(0.3, 10),
    "rows": Part(0.7, 0),
    "graph": Part(0.4, 8),
    "flex": Part(1.0, 30),
}
"""In execution order: parts that decide a goal come first. `dense` runs before any kernel of ours."""
CHECK_SECONDS = 100
TINY = Shape(layers=1, heads=1, head_dim=64, ffn=32, tokens=4, window=4, chunk=1, text=4)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for results.json and results.md")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds")
    parser.add_argument("--budget", type=float, default=480, help="seconds for the whole command")
    parser.add_argument("--parts", nargs="*", choices=sorted(PARTS), default=list(PARTS), help="only these parts")
    parser.add_argument("--tiles", type=Path, help="use the tiles in this file written by tune.py, and measure none")
    parser.add_argument("--resume", action="store_true", help="continue after an earlier process of this run was lost")
    parser.add_argument("--tiny", action="store_true", help="use a toy size, to check that everything runs")
    chosen = parser.parse_args(arguments)
    if torch.device(chosen.device).type == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "error: no CUDA device; run a toy size in the interpreter with --tiny --device cpu\n")
    return chosen


def describe(device, dtype, shape, chosen):
    """Device, versions and sizes of this run."""
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
    """Measure and write the results. Returns 0 if everything ran and every check passed, else 1."""
    started = time.monotonic() if started is None else started
    chosen = parse(arguments)
    budget, repeats, device = Budget(chosen.budget, started), chosen.repeats, torch.device(chosen.device)
    if device.type == "cuda":
        if device.index is not None:
            # CUDA events and streams belong to the current device.
            torch.cuda.set_device(device)
        if reason := lacking():
            print(reason, file=sys.stderr)
    dtype, shape, wanted = torch.bfloat16, Shape(), WAN_SIZES
    if chosen.tiny:
        # The interpreter gets bfloat16 products wrong.
        dtype, repeats, shape, wanted = torch.float32, 1, TINY, [(TINY.queries, 2, 1)]
    torch.manual_seed(0)
    first = describe(device, dtype, shape, chosen)
    record = Record(chosen.out, {**first, "tiles": []}, chosen.resume)
    result = record.result
    result["seconds"].setdefault("start", time.monotonic() - started)
    if device.type == "cuda":
        watch.guard(lambda: record.lost(f"it did not finish within {watch.PATIENCE:.0f} s"))

    def measure(part, work, into=None):
        if not record.done(part):
            record.measure(part, work, device, budget.left(), into)

    with torch.no_grad():
        measure("ceilings", lambda: ceilings(device, dtype, *((64, 1, 1) if chosen.tiny else ())))
        one, several = (shape, device, dtype, repeats), max(1, repeats // 3)
        measure("unsplit", lambda: sections.best_dense(*one, budget.part(0.05), (1,)))
        if "dense" in chosen.parts:
            best = stock(result, shape, "unsplit")
            measure("dense", lambda: sections.dense_step(*one, budget.part(0.1), best, saver(record, "dense")))
        wrong = known(record, measure, chosen, device, dtype, budget)
        measure("stock", lambda: sections.best_dense(*one, budget.part(0.1)))
        run = stock(result, shape, "stock")
        rows, first_row = saver(record, "attention"), wanted[:1]
        works = {
            "step": lambda left: sections.model_step(*one, left, run, saver(record, "step"), wrong),
            "streams": lambda left: streams.streams(shape, device, dtype, left),
            "attention": lambda left: sizes.attention(*one, left, first_row, rows, wrong),
            "chunk": lambda left: sections.chunk(
                shape, device, dtype, several, left, run, 2 if chosen.tiny else 5, wrong
            ),
            "profile": lambda left: sections.profile(shape, device, dtype, run, wrong),
            "rows": lambda left: sizes.attention(*one, left, wanted, rows, wrong, result.get("attention")),
            "graph": lambda left: sections.graph_step(*one, left, run, wrong),
            "flex": lambda left: sizes.flex(*one, left, wanted, saver(record, "flex"), wrong),
        }
        for part, work in works.items():
            share, least = PARTS[part]
            if part not in chosen.parts or record.done(part):
                continue
            into = "attention" if part == "rows" else part
            if budget.left() <= (0 if chosen.tiny else least):
                found = result.get(into) or {}
                left_out = [*found.get("left_out", []), f"all of {part}: no time was left"]
                record.save(into, {**found, "left_out": left_out})
                continue
            measure(part, lambda work=work, share=share: work(budget.part(share)), into)
    result["seconds"]["all"] = time.monotonic() - started
    record.save("finished", True)
    print(table(result))
    failed = any("failed" in found for found in result.values() if isinstance(found, dict))
    return int(bool(result["checks"].get("failures")) or failed or bool(result.get("lost")))


def saver(record, part):
    """A function that saves what a part has found so far."""
    return functools.partial(record.save, part)


def stock(result, shape, part):
    """The best stock attention of a part, or torch's own if the part has none."""
    return Stock.named((result.get(part) or {}).get("best") or TORCH, shape.head_dim**-0.5)


def known(record, measure, chosen, device, dtype, budget):
    """Ops that fail their checks, with the tiles of the package, of `--tiles` or those that `tune` finds fastest."""
    result, shipped = record.result, tune.tables()

    def failures(tiles=None, ops=None):
        """Failed checks. On a GPU they run in other processes, so that a bad kernel cannot end this one."""
        if device.type == "cuda":
            return isolated(device, Budget(min(CHECK_SECONDS, max(10, budget.left() / 3))), ops, tiles)
        return check_all(device, dtype)

    def taken(path, ops=None):
        """Switch to the tiles in a file and return the failures with them; None, without switching, if any fail."""
        try:
            tiles = tune.use(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            # `use` may have applied some of the tiles.
            tune.restore(shipped)
            print(f"warning: ignoring the tiles of {path}: {told(error)}", file=sys.stderr)
            return None
        try:
            found = failures(path, ops)
        except Exception as error:
            found = [told(error)]
        if found:
            tune.restore(shipped)
            result["tiles_refused"] = {"tiles": tiles, "failures": found}
            print(f"warning: rejecting the tiles of {path}: {'; '.join(found)}", file=sys.stderr)
            return None
        result.update(tiles=tiles, tiles_from=str(path))
        return found

    def checked():
        found = taken(chosen.tiles) if chosen.tiles else None
        return {"failures": failures() if found is None else found}

    def tuned():
        path = chosen.out / "tiles.json"
        path.unlink(missing_ok=True)
        left = budget.part(PARTS["tune"].share)
        command = [sys.executable, tune.__file__, "--out", str(path), "--budget", f"{left.left():.0f}"]
        command += ["--workers", str(max(2, (os.cpu_count() or 2) - 2)), "--ops", tune.ATTEND, tune.EXPAND]
        ended = processes.together({"tune": command}, 1, Budget(left.left() + 20))
        if not path.exists():
            raise RuntimeError(f"tune.py wrote nothing: {ended['tune']}")
        found = json.loads(path.read_text(encoding="utf-8"))
        ops = {"expand_kv_" if op == tune.EXPAND else op.partition(",")[0] for op in found["change"]}
        if ops and taken(path, sorted(ops)) is not None:
            # Ops that failed with other tiles pass with these.
            before = result["checks"].get("failures")
            if before is not None:
                result["checks"] = {"failures": [line for line in before if not red([line]) & ops]}
        return {key: found[key] for key in ("times", "refused", "change")}

    if record.done("checks") and result.get("tiles_from"):
        tune.use(result["tiles_from"])
    measure("checks", checked)
    least = PARTS["tune"].least
    if "tune" in chosen.parts and not chosen.tiles and device.type == "cuda" and budget.left() > least:
        measure("tune", tuned)
    found = result["checks"].get("failures")
    print("\n".join(found or ["all kernels agree with float64"] * (found == [])), file=sys.stderr)
    # Without check results, no op is known to be right.
    return set(CHECKS) if found is None else red(found)


if __name__ == "__main__":
    sys.exit(main(started=STARTED))
