"""Whether what is timed is right at the size at which it is timed: once against plain torch, and the same twice."""

from __future__ import annotations

import mla_attention as ops
import plain
import torch
from checks import listed

ALLOWED = 3e-2
"""Difference from the expected result, relative to its largest magnitude: as for stock attention."""
LOGITS = 2.5e8
"""Logits that a reference may hold in float32: 1 GB, of which it makes some copies."""


def difference(found, expected):
    """The largest difference over the largest magnitude, NaN where something is not a number."""
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


def verdict(run, expected, strict=True, read=lambda found: found):
    """How `run` compares with `expected`, functions that give one or more tensors, and in words what is wrong.

    `strict` wants two runs to be equal to the bit, in all that they give; `expected` is that of what `read` takes.
    """
    first = [x.clone() for x in listed(run())]
    found = run()
    equal = all(torch.equal(x, y) for x, y in zip(first, listed(found), strict=True))
    # What is expected may be computed in the place of what was found.
    given = [x.clone() for x in listed(read(found))]
    pairs = zip(given, listed(expected()), strict=True)
    error = max((difference(x, y) for x, y in pairs), key=lambda x: (x != x, x))
    told = {"error": error, "equal": equal}
    if not error <= ALLOWED:
        return told, f"differs at full size by {error:.1e} of the largest output"
    return told, "two runs differ" if strict and not equal else None


def sampled(queries, rows):
    """A slice of some queries from all of them, so that the logits of `rows` times one query are no more than LOGITS.

    Tiles hold neighbours: some of every tile are among them.
    """
    return slice(None, None, max(1, -(-queries * rows // int(LOGITS))))


def way_agrees(way, shape, device, dtype):
    """`verdict` of a layer of a way against the same way by `plain`; of torch's part of it two runs may differ.

    None where the way runs nothing of ours.
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
        # What is expanded ahead is that of the second layer.
        return way.attend(1, *given) if getattr(way, "ahead", False) and shape.layers > 1 else out

    def expected():
        way.kernels = plain
        if run is not None:
            way.run = lambda query, key, value: plain.attend(query, key, value, None, shape.head_dim**-0.5)[0]
        try:
            return attended()
        finally:
            way.kernels, way.run = ops, run
            # What it has kept was expanded by torch.
            way.start_chunk()

    return verdict(attended, expected, strict=run is None and getattr(way, "apart", None) is None)


def writes_agree(way, shape, device, dtype):
    """`verdict` of the rows that a way writes for a layer; None where none of our ops writes them."""
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
