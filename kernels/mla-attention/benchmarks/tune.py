"""Measure all candidate tiles of the kernels at the Wan2.1-1.3B geometry: `python tune.py --out tiles.json`.

Every candidate is compiled and compared with float64 in a separate process, so one that fails does not affect the
others. Those that are right are timed in turn, round by round, by CUDA events around replays of CUDA graphs. The output
contains medians and the table entries that should change. `--compile-only 90` compiles the candidates for a compute
capability ahead of time, without a GPU, and lists the results. `--tiny` runs a toy size in Triton's interpreter, as a
test; its times mean nothing. `use(path)` puts the fastest tiles of such a file into the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "torch-ext"), str(HERE.parent / "tests")]
if ("--tiny" in sys.argv or os.environ.get("MLA_TUNE_TINY")) and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import mla_attention as ops  # noqa: E402
import torch  # noqa: E402
from candidates import CANDIDATES  # noqa: E402
from checks import relative_error  # noqa: E402
from mla_attention import attend_tiles, expand_tiles, latent_tiles  # noqa: E402
from mla_attention._runtime import tile_family  # noqa: E402
from processes import TIME_ENDED, together  # noqa: E402
from timing import Budget, both  # noqa: E402

ATTEND, EXPAND = "attend", "expand_kv"
RANKS = (64, 96, 128, 192)
SHARED, HEADS, DEPTH, TOKENS = 32, 12, 128, 1560
ALLOWED = 1.6e-2
"""Allowed error relative to the largest output: two units in the last place of bfloat16."""
SIZES = {"queries": 4680, "frames": 18, "checked_queries": 200, "checked_frames": 1}
TINY = {"queries": 12, "frames": 1, "checked_queries": 12, "checked_frames": 1}
TABLES = (attend_tiles.TILES, attend_tiles.DESCRIBED, latent_tiles.TILES, expand_tiles.TILES)


@contextlib.contextmanager
def table(op, tiles, family):
    """A context with `tiles` in the tables of the package for an op; the tables are restored afterwards."""
    kept = tables()
    try:
        enter(op, tiles, family)
        yield
    finally:
        restore(kept)


def tables():
    """A copy of the package's tables, for `restore`."""
    return [dict(found) for found in TABLES]


def restore(kept):
    """Restore the package's tables from a copy made by `tables`."""
    for found, old in zip(TABLES, kept):  # noqa: B905
        found.clear()
        found.update(old)


def enter(op, tiles, family):
    """Put `tiles` into the table of an op."""
    if op == ATTEND and tiles.described:
        attend_tiles.DESCRIBED[family] = tiles
    elif op == ATTEND:
        attend_tiles.DESCRIBED.pop(family, None)
        (limit, _), *rest = attend_tiles.TILES[family]
        attend_tiles.TILES[family] = [(limit, tiles), *rest]
    elif op == EXPAND:
        expand_tiles.TILES[family] = tiles
    else:
        rank, before = int(op.rpartition(" ")[2]), latent_tiles.TILES[family]
        entries = {**dict(before), rank: tiles}
        # An entry also covers lower ranks: give the next lower measured rank its previous tiles.
        for below in [one for one in RANKS if one < rank][-1:]:
            entries.setdefault(below, next(found for limit, found in before if below <= limit))
        latent_tiles.TILES[family] = sorted(entries.items())


def use(path):
    """Put the fastest tiles from a file written by `main` into the tables of the package; returns them as lines."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    kinds = {ATTEND: attend_tiles.Tiles, EXPAND: expand_tiles.Tiles}
    for op, tiles in found["change"].items():
        enter(op, kinds.get(op, latent_tiles.Tiles)(*tiles), found["family"])
    return [f"{op}: {tiles}" for op, tiles in found["change"].items()]


def case(op, queries, frames, device, dtype, tokens=TOKENS, heads=HEADS, depth=DEPTH):
    """A function that runs an op, and one that computes its result in float64; both return lists of tensors."""
    generator = torch.Generator(device=device).manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    keys, scale = frames * tokens, depth**-0.5
    if op == ATTEND:
        given = random(1, queries, heads, depth), random(1, keys, heads, depth), random(1, keys, heads, depth)
        run = functools.partial(ops.attend, *given, None, scale)
        return run, lambda: ops.attend_reference(*(x.double() for x in given), None, scale)
    slots = torch.arange(frames, dtype=torch.int32, device=device)
    angle = torch.rand(keys, depth // 2, device=device, generator=generator)
    turn = torch.stack([angle.cos(), angle.sin()], dim=-1)
    if op == EXPAND:
        rank = 192
        rows, up, bias = (
            random(1, frames, tokens, rank),
            random(2 * heads * depth, rank) / 14,
            random(2 * heads * depth),
        )
        spaces = [torch.full((1, keys, heads, depth), float("nan"), device=device, dtype=dtype) for _ in range(2)]

        def run_expand():
            ops.expand_kv_(*spaces, rows, None, slots, None, up, bias, None, None, turn, True)
            return spaces

        def exact():
            wide = [torch.zeros(1, keys, heads, depth, device=device, dtype=torch.float64) for _ in range(2)]
            weights = up.double(), bias.double()
            ops.expand_kv_reference(*wide, rows.double(), None, slots, None, *weights, None, None, turn.double(), True)
            return wide

        return run_expand, exact
    rank = int(op.rpartition(" ")[2])
    turn = turn[:, : SHARED // 2].contiguous()
    rows = random(1, frames, tokens, rank + SHARED)
    given = random(1, queries, heads, rank), random(1, queries, heads, SHARED)
    run = functools.partial(ops.latent_attention, *given, rows, None, slots, None, turn, scale)
    return run, lambda: ops.latent_attention_reference(
        *(x.double() for x in given), rows.double(), None, slots, None, turn.double(), scale
    )


def sized(op, sizes, checked, device, dtype, tiny):
    """`case` at the timed size, or at the checked size if `checked`."""
    prefix = "checked_" if checked else ""
    small = {"tokens": 10, "heads": 2, "depth": 64} if tiny else {}
    return case(op, sizes[prefix + "queries"], sizes[prefix + "frames"], device, dtype, **small)


def check(op, index, family, device, dtype, tiny):
    """The largest relative error of a candidate. Also runs it once at the timed size, which compiles it."""
    sizes = TINY if tiny else SIZES
    with table(op, CANDIDATES[family][op][index], family), torch.no_grad():
        run, exact = sized(op, sizes, True, device, dtype, tiny)
        found = [relative_error(x, y) for x, y in zip(run(), exact())]  # noqa: B905
        if not tiny:
            sized(op, sizes, False, device, dtype, tiny)[0]()
            torch.cuda.synchronize(device)
    return max(found)


def checked(todo, family, device, tiny, workers, budget):
    """Errors of candidates `(op, index)`, each from a separate process, or a message if there is none."""
    environment = {**os.environ, "MLA_TUNE_TINY": "1"} if tiny else None
    commands = {
        (op, index): [sys.executable, __file__, "--check", op, str(index), str(family), "--device", device]
        + ["--tiny"] * tiny
        for op, index in todo
    }
    return together(commands, workers, budget, environment)


def measure(family, right, device, dtype, repeats, tiny, budget):
    """Milliseconds of all candidates that are right, by op, and the reasons why others were left out."""
    found, refused = {}, {}
    for place, op in enumerate(right):
        run, _ = sized(op, TINY if tiny else SIZES, False, device, dtype, tiny)

        def timed(tiles, op=op, run=run):
            with table(op, tiles, family):
                return run()

        variants = {}
        for tiles in right[op]:
            try:
                timed(tiles)
                variants[str(tuple(tiles))] = functools.partial(timed, tiles)
            except Exception as error:
                refused[f"{op} {tuple(tiles)}"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        # Use graphs except on a CPU: launching expand_kv_ from Python takes about as long as running it.
        found[op] = both(variants, repeats, device, budget.part(1 / (len(right) - place)))
    return found, refused


def changes(family, right, times, refused):
    """Tiles by op if another candidate's median is more than 1 % below that of the tiles in the table.

    Also if the tiles in the table were `refused`, unless time ran out before their check.
    """
    found = {}
    for op, medians in times.items():
        if not medians:
            continue  # none of them ran
        own = str(tuple(CANDIDATES[family][op][0]))
        best = min(
            right[op], key=lambda tiles: medians.get(str(tuple(tiles)), {"median_ms": float("inf")})["median_ms"]
        )
        least = medians[str(tuple(best))]["median_ms"]
        failed = refused.get(f"{op} {own}", TIME_ENDED) != TIME_ENDED
        if failed if own not in medians else least < 0.99 * medians[own]["median_ms"]:
            found[op] = list(best)
    return found


def compile_only(capability):
    """Compile all candidates ahead of time and print a line of JSON for each. Returns 1 if tiles of the tables fail."""
    aot = importlib.import_module("aot")
    family, failed = tile_family(capability), False
    for op, every in CANDIDATES[family].items():
        for place, tiles in enumerate(every):
            line = {"op": op, "tiles": list(tiles)}
            with table(op, tiles, family):
                try:
                    found = aot.compiled(variant(op, capability), capability, True)
                    line.update({key: found[key] for key in ("registers", "spilled", "shared", "tmem", "loop")})
                    line["wrong"] = aot.violations(found)
                except Exception as error:
                    line["wrong"] = [f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"]
            failed |= place == 0 and bool(line["wrong"])
            print(json.dumps(line), flush=True)
    return int(failed)


def variant(op, capability):
    """The variant of an op that `aot.py` compiles."""
    variants = importlib.import_module("variants")
    if op == ATTEND:
        return variants.attend_variant(DEPTH, SIZES["queries"], capability)
    if op == EXPAND:
        return variants.expand_variant(192, DEPTH, HEADS, True, False, capability)
    return variants.latent_variant(int(op.rpartition(" ")[2]), SHARED, SIZES["queries"], False, False, capability)


def report(result):
    """Medians of all candidates by op, the fastest first, and the table entries that should change."""
    lines = [f"{result['device']}, family {result['family']}: medians"]
    for op, times in result["times"].items():
        lines += ["", op]
        for name, found in sorted(times.items(), key=lambda item: item[1]["median_ms"]):
            low, high = found["quartiles_ms"]
            lines.append(f"  {found['median_ms']:8.4f} ms ({low:.4f} to {high:.4f})  {name}")
    lines += [f"\nleft out: {name}: {reason}" for name, reason in result["refused"].items()]
    lines += ["", "change:" if result["change"] else "change nothing"]
    return "\n".join(lines + [f"  {op}: {tuple(tiles)}" for op, tiles in result["change"].items()])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tiles.json"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=11, help="timed rounds")
    parser.add_argument("--budget", type=float, default=160, help="seconds for everything")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that check")
    parser.add_argument("--ops", nargs="*", help="only ops whose names start with one of these")
    parser.add_argument("--tiny", action="store_true", help="a toy size in the interpreter")
    parser.add_argument("--compile-only", type=int, metavar="CAPABILITY", help="compile ahead of time, without a GPU")
    parser.add_argument("--check", nargs=3, metavar=("OP", "INDEX", "FAMILY"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.compile_only:
        return compile_only(chosen.compile_only)
    device, dtype = torch.device(chosen.device), torch.float16 if chosen.tiny else torch.bfloat16
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.exit(
            1, "error: no CUDA device; use --compile-only 90 to compile ahead of time, --tiny --device cpu as a test\n"
        )
    if chosen.check:
        op, index, family = chosen.check
        print(json.dumps(check(op, int(index), int(family), device, dtype, chosen.tiny)))
        return 0
    budget = Budget(chosen.budget)
    capability = 10 * torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 80
    family = tile_family(capability)
    every = {
        op: tiles for op, tiles in CANDIDATES[family].items()
        if not chosen.ops or any(op.startswith(name) for name in chosen.ops)
    }  # fmt: skip
    todo = [(op, index) for op, tiles in every.items() for index in range(len(tiles))]
    # Tiles of the tables first: without their times, nothing can be found faster.
    todo.sort(key=lambda one: one[1] > 0)
    errors = checked(todo, family, chosen.device, chosen.tiny, chosen.workers, budget.part(0.6))
    right = {
        op: [
            one for index, one in enumerate(tiles)
            if isinstance(errors[op, index], float) and errors[op, index] <= ALLOWED
        ]
        for op, tiles in every.items()
    }  # fmt: skip
    refused = {
        f"{op} {tuple(every[op][index])}": error if isinstance(error, str) else f"error {error:.1e}, allowed {ALLOWED}"
        for (op, index), error in errors.items()
        if every[op][index] not in right[op]
    }
    right = {op: tiles for op, tiles in right.items() if tiles}
    with torch.no_grad():
        times, failed = measure(family, right, device, dtype, 1 if chosen.tiny else chosen.repeats, chosen.tiny, budget)
    refused |= failed
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__,
        "family": family,
        "tiny": chosen.tiny,
        "sizes": TINY if chosen.tiny else SIZES,
        "times": times,
        "refused": refused,
        "change": changes(family, right, times, refused),
    }
    chosen.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(report(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
