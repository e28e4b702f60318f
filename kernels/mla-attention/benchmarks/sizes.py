"""Benchmark the attention of one layer by size: ours and stock, dense, absorbed and expanded; FlexAttention apart."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import fullsize
import mla_attention as ops
import torch
from dense import torch_runs, usable, yardstick
from report import SHARED
from timing import both, does_not_fit, runnable, told
from watch import mark, require_answer

RANKS = (64, 96, 128, 192, 256)
ROTATED_RANKS = (64, 192, 256)
"""Ranks that are also expanded with all heads rotated, like the layout `rotate_on_read`."""
MIXED = (624, 64)
"""A rank, and how many of its latents have 8 bits if the others have 4: the bytes of rank 192 in 16 bits."""
BY_PRODUCT = 192
"""The rank whose values are also expanded by a torch matrix product."""
SPLITS = (1, 2, 5)
STOCK = ("flash", "cuDNN")
FLEX = ("FlexAttention",)


def attention(shape, device, dtype, repeats, budget, sizes, save, red=frozenset(), before=None):
    """Attention of one layer at `sizes` of (queries, frames of keys, batch); reports the sizes that time leaves out.

    Ops in `red` are left out. Expansion does not depend on the queries, so it is timed with the first size that runs
    for its keys and batch. `before` holds earlier results, which are kept.
    """
    found = (before or {}).get("rows") or []
    expanded = {(row["keys"] // shape.tokens, row["batch"]) for row in found if any(map(_expands, row["times"]))}

    def row(queries, frames, batch):
        case = _Case(shape, device, dtype, queries, frames, batch)
        variants, refused = case.stock(STOCK)
        ours = _ours(case, ranks=() if (frames, batch) in expanded else RANKS)
        for name, one in ours.items():
            if one.op in red:
                refused[name] = f"{one.op} failed its check"
            else:
                variants[name] = one.run
        found = case.timed(variants, refused, repeats, budget, ours)
        # Mark it only now: if this size fails, the next one with the same keys and batch expands.
        expanded.add((frames, batch))
        return found

    return _rows(shape, device, budget, sizes, save, row, before)


def _expands(name):
    return name.startswith("expand")


def flex(shape, device, dtype, repeats, budget, sizes, save, red=frozenset()):
    """FlexAttention at the sizes with a chunk's queries, beside torch's choice and ours; None without a GPU.

    It runs last and separately, because compiling it for every size takes longer than everything else.
    """
    if device.type != "cuda":
        return None

    def row(queries, frames, batch):
        case = _Case(shape, device, dtype, queries, frames, batch)
        variants, refused = case.stock(FLEX)
        if "attend" not in red:
            variants[BY_RULE] = case.attend(0)
        return case.timed(variants, refused, repeats, budget)

    chosen = [size for size in sizes if size[0] == shape.queries and size[2] == 1]
    return _rows(shape, device, budget, chosen, save, row)


BY_RULE = "attend, splits by rule"


def _rows(shape, device, budget, sizes, save, row, before=None):
    """One row per size that time and memory allow; a failure is reported and does not affect other rows."""
    before = before or {}
    rows, left_out, failed = list(before.get("rows") or []), [], [before["failed"]] if "failed" in before else []
    done = {(row["queries"], row["keys"], row["batch"]) for row in rows}

    def found():
        more = {"failed": "; ".join(failed)[:1000]} if failed else {}
        return {"rows": rows, "left_out": left_out, **more}

    for queries, frames, batch in sizes:
        name = f"{queries} x {frames * shape.tokens} x {batch}"
        if (queries, frames * shape.tokens, batch) in done:
            continue
        if budget.left() <= 0:
            left_out.append(name)
            continue
        try:
            mark(name)
            rows.append(row(queries, frames, batch))
            print(f"attention {name}: done", file=sys.stderr)
        except Exception as error:
            require_answer(device, error)
            (left_out if does_not_fit(error) else failed).append(f"{name}: {told(error)}")
            print(f"attention {name}: {told(error)}", file=sys.stderr)
        try:
            if device.type == "cuda":
                torch.cuda.empty_cache()
        except Exception as error:
            failed.append(f"{name}: {told(error)}")
        save(found())
    return found()


class _Case:
    """Queries, keys and values of one size."""

    def __init__(self, shape, device, dtype, count, window, batch):
        self.shape, self.device, self.dtype, self.batch, self.window = shape, device, dtype, batch, window
        self.count, self.keys, self.scale = count, window * shape.tokens, shape.head_dim**-0.5
        self.query, self.key, self.value = (self.randn(batch, n, shape.head_dim) for n in (count, self.keys, self.keys))

    def randn(self, batch, tokens, channels):
        """Random tensor `[B, N, H, C]`."""
        return torch.randn(batch, tokens, self.shape.heads, channels, device=self.device, dtype=self.dtype)

    def stock(self, names):
        """Stock attentions and torch's own as functions without arguments, and the reasons why others do not run."""
        found, refused = usable(self.query, self.key, self.value, self.scale, SPLITS, names)
        parts = (self.query, self.key, self.value)
        return {name: functools.partial(stock, *parts) for name, stock in found.items()}, refused

    def attend(self, splits):
        """Our attention; with 0 splits, the rule that the model uses chooses them."""
        return functools.partial(ops.attend, self.query, self.key, self.value, None, self.scale, splits)

    def flop(self, name):
        """Operations of a variant: those of dense attention unless its name contains a rank."""
        pairs = self.batch * self.shape.heads * self.count * self.keys
        depth, (way, _, rank) = self.shape.head_dim, name.partition(", rank ")
        if not rank:
            return 4 * pairs * depth
        rank = int(rank.partition(",")[0])
        if way == "absorbed":
            return 2 * pairs * (2 * rank + SHARED)
        restored = 2 * depth - SHARED * (way == "expand")
        return 2 * self.batch * self.keys * self.shape.heads * rank * restored

    @functools.cached_property
    def expected(self):
        """The result of attention to all keys, by torch."""
        return yardstick(self.query, self.key, self.value, self.scale)

    def checked(self, variants, ours):
        """Results of comparing `ours` at this size, and the reasons why some must not be timed."""
        found, refused = {}, {}
        for name in (name for name in variants if name in ours):
            mark(name)
            try:
                found[name], wrong = fullsize.verdict(ours[name].run, ours[name].expected, read=ours[name].read)
            except Exception as error:
                require_answer(self.device, error)
                wrong = f"not compared at full size: {told(error)}"
            if wrong:
                refused[name] = wrong
        return found, refused

    def timed(self, variants, refused, repeats, budget, ours=None):
        """The row of this size. Raises RuntimeError if nothing runs."""
        variants, others = runnable(variants, self.device)
        checked, wrong = self.checked(variants, ours or {})
        variants = {name: run for name, run in variants.items() if name not in wrong}
        refused = {**refused, **others, **wrong}
        if not variants:
            raise RuntimeError(next(iter(others.values()), "nothing runs"))
        times = both(variants, repeats, self.device, budget)
        for name, found in times.items():
            found["tflop_s"] = self.flop(name) / found["median_ms"] / 1e9
        runs = torch_runs(self.query, self.key, self.value)
        size = {"batch": self.batch, "queries": self.count, "keys": self.keys}
        return {**size, "times": times, "refused": refused, "torch_runs": runs, "checked": checked}


class Ours(NamedTuple):
    """A timed call to one of our ops: the op's name, the call, what to read from its result and the expected value."""

    op: str
    run: Callable
    read: Callable
    expected: Callable


def _ours(case, ranks):
    """Our ops by variant name; expansion only at `ranks`."""
    shape, device, dtype, batch = case.shape, case.device, case.dtype, case.batch
    heads, depth, keys = shape.heads, shape.head_dim, case.keys
    found = {}
    for splits in (0, *SPLITS):
        name = f"attend, {splits} split{'s' * (splits > 1)}" if splits else BY_RULE
        found[name] = Ours("attend", case.attend(splits), lambda result: result[0], lambda: case.expected)
    slots = torch.arange(case.window, dtype=torch.int32, device=device)
    turn = torch.zeros(keys, depth // 2, 2, device=device)
    turn[..., 0] = 1
    shared_turn = turn[:, : SHARED // 2].contiguous()
    # Expand to separate memory, shared by all ranks, not to what the attention timed beside it reads.
    spaces = [torch.empty_like(x) for x in (case.key, case.value)]

    def expand(name, rank, rotated, eight=None):
        shared = 0 if rotated else SHARED
        rows = torch.randn(batch, case.window, shape.tokens, rank + shared, device=device, dtype=dtype)
        rows, scales = (rows, None) if eight is None else ops.quantize_rows(rows, eight, rank)
        up = torch.randn(heads * (2 * depth - shared), rank, device=device, dtype=dtype) * rank**-0.5
        bias = torch.zeros(len(up), device=device, dtype=dtype)
        rest = rows, scales, slots, None, up, bias, None, None, turn if rotated else shared_turn, rotated, eight

        def expected():
            plain = [torch.zeros_like(x) for x in spaces]
            ops.expand_kv_reference(*plain, *rest)
            return plain

        def run():
            ops.expand_kv_(*spaces, *rest)
            return spaces

        found[name] = Ours("expand_kv_", run, lambda result: result, expected)
        if not rotated or rank != BY_PRODUCT:
            return
        # Values need only a product: use torch's, on a copy of the rows in reading order.
        value_up, value_bias = (x.unflatten(0, (heads, -1))[:, depth:].flatten(0, 1).contiguous() for x in (up, bias))
        product = importlib.import_module("mla_attention.expand_kv")._product

        def by_product():
            product(spaces[0], depth, heads, rows, None, slots, None, up, bias, 2 * depth, turn)
            for latents, values in zip(rows.index_select(1, slots).flatten(1, 2), spaces[1], strict=True):
                torch.addmm(value_bias, latents, value_up.T, out=values.flatten(1))
            return spaces

        found[f"{name}, values by addmm"] = Ours("expand_kv_", by_product, lambda result: result, expected)

    for rank in RANKS:
        rows = torch.randn(batch, case.window, shape.tokens, rank + SHARED, device=device, dtype=dtype)
        latent, pe = (case.randn(batch, case.count, channels) for channels in (rank, SHARED))
        rest = (rows, None, slots, None, shared_turn, case.scale)
        some = fullsize.sampled(case.count, batch * heads * keys)
        found[f"absorbed, rank {rank}"] = Ours(
            "latent_attention",
            functools.partial(ops.latent_attention, latent, pe, *rest),
            lambda result, some=some: result[0][:, some],
            lambda some=some, latent=latent, pe=pe, rest=rest: ops.latent_attention_reference(
                latent[:, some], pe[:, some], *rest
            )[0],
        )
        if rank in ranks:
            expand(f"expand, rank {rank}", rank, False)
            if rank in ROTATED_RANKS:
                expand(f"expand with heads rotated, rank {rank}", rank, True)
    if ranks:
        rank, eight = MIXED
        expand(f"expand with heads rotated, rank {rank}, {eight} in 8 bits, the others in 4", rank, True, eight)
    return found
