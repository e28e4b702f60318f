"""Check every op against its float64 reference, relative to the error of plain torch in the same dtype.

`python checks.py attend` prints the failures of one op as JSON; on a CPU it needs `TRITON_INTERPRET=1`.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "torch-ext")]

import mla_attention as ops  # noqa: E402
import torch  # noqa: E402
from processes import together  # noqa: E402

FACTOR = 1.2
"""Allowed ratio of an op's relative error to that of torch in the same dtype."""
FLOOR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Errors below this pass: two units in the last place, the rounding of the result itself."""


def relative_error(actual, expected):
    """Largest difference divided by the largest magnitude; inf if any difference is not finite."""
    difference = (actual.double() - expected.double()).abs()
    if not bool(torch.isfinite(difference).all()):
        return float("inf")
    return float(difference.max() / expected.abs().max().clamp_min(1e-30))


def listed(found):
    """A list of tensors; a single tensor becomes a list of one."""
    return [found] if isinstance(found, torch.Tensor) else found


SIZES = ((10, 40, 3, 64, 96), (25, 40, 3, 64, 96))
"""Tokens per frame, queries, heads, channels per head and rank: less than one block of keys, and several blocks."""
MEASURED = tuple((150, 100, 12, 128, rank) for rank in (192, 64, 448))
"""Larger sizes that use the timed tiles: many queries, and several blocks of any size, the last one partial."""


def red(failures):
    """Names of the ops in some lines of `check_all`."""
    return {line.partition(",")[0] for line in failures}


def check_all(device, dtype, seed=0, chosen=None):
    """One line per failed check, starting with the op's name: both errors, or why it does not run. Empty if all pass.

    `chosen` names the ops to check (default: all). MEASURED sizes are skipped in the interpreter, which is too slow.
    """
    sizes = SIZES + MEASURED if device.type == "cuda" else SIZES
    return [line for size in sizes for line in check(device, dtype, seed, *size, chosen=chosen)]


def isolated(device, budget, chosen=None, tiles=None, workers=None):
    """`check_all` with a process for every op; `tiles` is a file for `tune.use`.

    An op also fails if its process exceeds `budget` or ends without a result.
    """
    chosen = list(CHECKS if chosen is None else chosen)
    command = [sys.executable, __file__, "--device", str(device), *(["--tiles", str(tiles)] if tiles else [])]
    workers = workers or max(2, (os.cpu_count() or 2) - 2)
    found = together({op: [*command, op] for op in chosen}, workers, budget)
    failures = []
    for op in chosen:
        lines = found[op]
        failures += lines if isinstance(lines, list) else [f"{op}, in a process of its own: {lines}"]
    return failures


def check(device, dtype, seed, *size, chosen=None):
    """`check_all` at one size."""
    return [
        line for op in (CHECKS if chosen is None else chosen) for line in CHECKS[op](Case(device, dtype, seed, *size))
    ]


class Case:
    """Random inputs of one size, and the failures at that size."""

    batch, frames, shared = 2, 3, 32

    def __init__(self, device, dtype, seed, tokens, queries, heads, depth, rank):
        self.device, self.dtype, self.tokens, self.queries = device, dtype, tokens, queries
        self.heads, self.depth, self.rank = heads, depth, rank
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.keys, self.scale, self.failures = self.frames * tokens, depth**-0.5, []

    def random(self, *shape):
        return torch.randn(*shape, device=self.device, generator=self.generator).to(self.dtype)

    def rotations(self, tokens, pairs):
        angle = torch.rand(tokens, pairs, device=self.device, generator=self.generator)
        return torch.stack([angle.cos(), angle.sin()], dim=-1)

    def ring(self):
        """Rows with one poisoned slot, the slots to read, and the number of valid keys: all that they hold."""
        rows = self.random(self.batch, self.frames + 1, self.tokens, self.rank + self.shared)
        rows[:, 1] = float("nan")
        slots = torch.tensor([2, 0, 3], dtype=torch.int32, device=self.device)
        return rows, slots, torch.full((1,), self.keys, dtype=torch.int32, device=self.device)

    @property
    def bits(self):
        """Numbers of latents in 8 bits to check: rows in the model's dtype, and rows whose other latents have 4."""
        return None, self.rank // 4

    def stored(self, rows, eight):
        """Rows and scales as the ops read them; what is NaN in the rows is NaN in the scales."""
        if eight is None:
            return rows, None
        steps, scales = ops.quantize_rows(rows.float().nan_to_num(), eight, self.rank)
        return steps, scales.masked_fill(rows[..., :1].isnan(), float("nan"))

    def compare(self, names, run, exact, plain):
        where = f"{self.keys} keys, rank {self.rank}"
        try:
            actual = run()
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self.failures.append(f"{names[0]}, {where}: {text}")
            return
        for name, found, reference, usual in zip(names, *map(listed, (actual, exact, plain)), strict=True):
            error, allowed = relative_error(found, reference), relative_error(usual, reference)
            allowed = max(FACTOR * allowed, FLOOR[self.dtype])
            if not error <= allowed:
                self.failures.append(f"{name}, {where}: error {error:.2e}, allowed {allowed:.2e}")


def _attend(case):
    query, key, value = (
        case.random(case.batch, n, case.heads, case.depth) for n in (case.queries, case.keys, case.keys)
    )
    exact = ops.attend_reference(*(x.double() for x in (query, key, value)), None, case.scale)[0]
    plain = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
    for splits in (1, 2, 5):
        run = functools.partial(ops.attend, query, key, value, None, case.scale, splits)
        case.compare([f"attend, {splits} splits"], lambda run=run: run()[0], exact, plain.transpose(1, 2))
    return case.failures


def _latent_attention(case):
    rows, slots, count = case.ring()
    turn = case.rotations(case.keys, case.shared // 2)
    latent, pe = (case.random(case.batch, case.queries, case.heads, width) for width in (case.rank, case.shared))
    for eight in case.bits:
        kept, scales = case.stored(rows, eight)
        rest = kept, scales, slots, count, turn, case.scale
        wide = kept.double() if eight is None else kept, scales, slots, count, turn.double(), case.scale
        exact, _ = ops.latent_attention_reference(latent.double(), pe.double(), *wide, eight=eight)
        plain, _ = ops.latent_attention_reference(latent, pe, *rest, eight=eight)
        for splits in (1, 3):
            run = functools.partial(ops.latent_attention, latent, pe, *rest, splits, eight)
            name = f"latent_attention, {splits} splits{_mixed(eight)}"
            case.compare([name], lambda run=run: run()[0], exact, plain)
    return case.failures


def _mixed(eight):
    return "" if eight is None else ", 8 and 4 bits"


def _expand(case):
    rows, slots, count = case.ring()
    shape, every = (case.batch, case.keys, case.heads, case.depth), case.rotations(case.keys, case.depth // 2)
    turn = case.rotations(case.keys, case.shared // 2)
    for rotate_heads in (False, True):
        nope = case.depth if rotate_heads else case.depth - case.shared
        up, bias = (
            case.random(case.heads * (nope + case.depth), case.rank),
            case.random(case.heads * (nope + case.depth)),
        )
        # Without a shared key, a row is only the latent, and all channels of a head are rotated.
        cached, turned = (rows[..., : case.rank].contiguous(), every) if rotate_heads else (rows, turn)

        for eight in case.bits:
            kept, scales = case.stored(cached, eight)
            rest = kept, scales, up, bias, turned, rotate_heads, eight

            def expanded(kind, function, kept, scales, up, bias, turned, rotate_heads, eight):
                out = [torch.zeros(shape, device=case.device, dtype=kind) for _ in range(2)]
                kept = kept.to(kind) if eight is None else kept
                turned = turned.to(torch.float64 if kind == torch.float64 else torch.float32)
                weights = up.to(kind), bias.to(kind), None, None, turned
                function(*out, kept, scales, slots, count, *weights, rotate_heads, eight)
                return out

            how = ", heads rotated" * rotate_heads + _mixed(eight)
            case.compare(
                [f"expand_kv_, keys{how}", f"expand_kv_, values{how}"],
                functools.partial(expanded, case.dtype, ops.expand_kv_, *rest),
                expanded(torch.float64, ops.expand_kv_reference, *rest),
                expanded(case.dtype, ops.expand_kv_reference, *rest),
            )
    return case.failures


def _norm(case):
    gain, hidden = case.random(case.heads * case.depth), case.random(case.batch, case.queries, case.heads * case.depth)
    turned = case.rotations(case.queries, case.depth // 2)
    exact = ops.qk_norm_rope_reference(hidden.double(), gain.double(), 1e-6, turned.double(), case.heads)
    rest = hidden, gain, 1e-6, turned, case.heads
    case.compare(["qk_norm_rope"], functools.partial(ops.qk_norm_rope, *rest), exact, ops.qk_norm_rope_reference(*rest))
    return case.failures


def _split(case):
    gain, hidden = case.random(case.heads * case.depth), case.random(case.batch, case.queries, case.heads * case.depth)
    turned = case.rotations(case.queries, case.depth // 2)
    coefficients = case.random(case.heads, case.shared // 2, 2)
    pairs = torch.arange(case.depth // 2, device=case.device)
    split = (pairs[case.shared // 2 :], pairs[: case.shared // 2], case.heads)
    wide = [x.double() for x in (turned, coefficients)]
    exact = ops.split_query_reference(hidden.double(), gain.double(), 1e-6, *wide, *split)
    rest = hidden, gain, 1e-6, turned, coefficients, *split
    names = ["split_query, unrotated", "split_query, rotated"]
    case.compare(names, functools.partial(ops.split_query, *rest), exact, ops.split_query_reference(*rest))
    return case.failures


def _merge(case):
    size = case.batch, case.queries, case.heads, case.depth
    parts = [(case.random(*size), case.random(case.batch, case.heads, case.queries).float()) for _ in range(2)]
    (a, log_a), (b, log_b) = parts
    exact = ops.merge_pair_reference(a.double(), log_a, b.double(), log_b)[0]
    plain = ops.merge_pair_reference(a, log_a, b, log_b)[0]
    case.compare(["merge_pair"], lambda: ops.merge_pair(a, log_a, b, log_b)[0], exact, plain)
    return case.failures


def _write(case):
    own, width = torch.tensor([1, 3], dtype=torch.int32, device=case.device), case.heads * case.depth
    down, down_bias = case.random(case.rank, 2 * width) / (2 * width) ** 0.5, case.random(case.rank)
    project, project_bias = case.random(case.shared, width) / width**0.5, case.random(case.shared)
    new_key, new_value = (case.random(case.batch, 2 * case.tokens, width) for _ in range(2))
    gain = case.random(width)

    def written(kind, function, eight):
        size = case.batch, case.frames + 1, case.tokens, case.rank + case.shared
        target, scales = case.stored(torch.zeros(size, device=case.device, dtype=kind), eight)
        given = [x.to(kind) for x in (new_key, new_value, gain)]
        weights = [x.to(kind) for x in (down, down_bias, project, project_bias)]
        function(target, scales, own, *given, 1e-6, None, *weights, None, case.heads, eight)
        return target if eight is None else ops.dequantize_rows(target, scales, torch.float64, eight, case.rank)

    whole = written(torch.float64, ops.latent_write_reference, None)

    def found(kind, function, eight):
        """The rows, or in fewer bits the error of every channel: a value at a border may round to the other step."""
        rows = written(kind, function, eight)
        return rows if eight is None else (rows - whole).square().mean((0, 1, 2)).sqrt()

    for eight in case.bits:
        case.compare(
            [f"latent_write_{_mixed(eight)}"],
            functools.partial(found, case.dtype, ops.latent_write_, eight),
            found(torch.float64, ops.latent_write_reference, eight),
            found(case.dtype, ops.latent_write_reference, eight),
        )
    return case.failures


CHECKS = {
    "attend": _attend,
    "latent_attention": _latent_attention,
    "expand_kv_": _expand,
    "qk_norm_rope": _norm,
    "split_query": _split,
    "merge_pair": _merge,
    "latent_write_": _write,
}
"""The check of every op, by name."""


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=list(CHECKS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiles", type=Path, help="use the tiles in this file, as run.py does")
    chosen = parser.parse_args(arguments)
    if chosen.tiles:
        importlib.import_module("tune").use(chosen.tiles)
    device = torch.device(chosen.device)
    # The interpreter gets bfloat16 products wrong.
    with torch.no_grad():
        print(json.dumps(check_all(device, torch.bfloat16 if device.type == "cuda" else torch.float32, 0, [chosen.op])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
