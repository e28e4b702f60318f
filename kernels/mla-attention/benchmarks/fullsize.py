"""Check timed work at its full size: compare it once with plain torch, and two runs with each other."""

from __future__ import annotations

import mla_attention as ops
import plain
import torch
from checks import listed

ALLOWED = 3e-2
"""Allowed difference relative to the largest magnitude of the expected result, as for stock attention."""
LOGITS = 2.5e8
"""Number of float32 logits a reference may hold: 1 GB, of which it makes a few copies."""


def difference(found, expected):
    """Largest difference divided by the largest magnitude; NaN if anything is NaN."""
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


def verdict(run, expected, strict=True, read=lambda found: found):
    """Compare `run` with `expected`, functions that return one or more tensors; also say in words what is wrong.

    `read` selects the part of the result that `expected` computes. With `strict`, the whole result must be equal to the
    bit in two runs.
    """
    first = [x.clone() for x in listed(run())]
    found = run()
    equal = all(torch.equal(x, y) for x, y in zip(first, listed(found), strict=True))
    # `expected` may overwrite the memory of the result.
    given = [x.clone() for x in listed(read(found))]
    pairs = zip(given, listed(expected()), strict=True)
    error = max((difference(x, y) for x, y in pairs), key=lambda x: (x != x, x))
    told = {"error": error, "equal": equal}
    if not error <= ALLOWED:
        return told, f"differs at full size by {error:.1e} of the largest output"
    return told, "two runs differ" if strict and not equal else None


def sampled(queries, rows):
    """A slice that samples the queries so that their logits, `rows` for each query, number at most LOGITS.

    A tile holds neighboring queries, so every tile is sampled.
    """
    return slice(None, None, max(1, -(-queries * rows // int(LOGITS))))


def way_agrees(way, shape, device, dtype):
    """`verdict` of one layer of a way against the same way on `plain`; two runs may differ if it uses stock attention.

    None if the way runs none of our ops.
    """
    if not way.ops:
        return None, None
    generator = torch.Generator(device).manual_seed(0)
    size = shape.batch, shape.queries, shape.dim
    given = [torch.randn(size, device=device, generator=generator).to(dtype) for _ in range(3)]
    run = way.run

    def attended():
        way.start_chunk()
        way.writing = False
        out = way.attend(0, *given)
        # A history expanded ahead belongs to the second layer.
        return way.attend(1, *given) if getattr(way, "ahead", False) and shape.layers > 1 else out

    def expected():
        way.kernels = plain
        if run is not None:
            way.run = lambda query, key, value: plain.attend(query, key, value, None, shape.head_dim**-0.5)[0]
        try:
            return attended()
        finally:
            way.kernels, way.run = ops, run
            # Drop the history that torch expanded.
            way.start_chunk()

    return verdict(attended, expected, strict=run is None and getattr(way, "apart", None) is None)


def writes_agree(way, shape, device, dtype):
    """`verdict` of the rows that a way writes for one layer; None if none of our ops writes them."""
    if not way.writes:
        return None, None
    generator = torch.Generator(device).manual_seed(0)
    size = shape.batch, shape.queries, shape.dim
    given = [torch.randn(size, device=device, generator=generator).to(dtype) for _ in range(2)]

    def written():
        way.write(0, *given)
        return way.rows[0][:, -shape.chunk :]

    def expected():
        way.kernels = plain
        try:
            return written()
        finally:
            way.kernels = ops

    return verdict(written, expected)
