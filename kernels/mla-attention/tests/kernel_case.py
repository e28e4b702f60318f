"""Shared by the kernel tests: devices, dtypes, errors against float64, and rings of cache rows with poisoned slots."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from mla_attention import dequantize_rows, quantize_rows
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

DTYPES = [torch.float16, torch.float32, *([torch.bfloat16] if DEVICE == "cuda" else [])]
"""bfloat16 only on a GPU: the interpreter gets it wrong."""

FAMILIES = [80, 90] if DEVICE == "cpu" else [None]
"""Compute capabilities whose tiles are tested in the interpreter; a GPU uses its own."""

EPSILON = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}
"""Relative error of one rounding: half the distance from 1 to the next number."""


def module(name: str) -> Any:
    """A module of the package, even if an op has the same name."""
    return importlib.import_module(f"mla_attention.{name}")


def take_tiles_of(family: int | None, name: str, monkeypatch) -> None:
    """Make a module of the package use the tiles of one of FAMILIES."""
    if family is not None:
        monkeypatch.setattr(module(name), "capability", lambda _: family)


def randn(*shape, dtype=torch.float32, seed=0, scale=1.0):
    """Normally distributed numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(DEVICE, dtype)


def error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference relative to the norm of `expected`, in float64; NaN if anything is NaN."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def unit_rotations(keys: int, pairs: int, seed: int = 0) -> Tensor:
    """Rotations by random angles, float32 `[keys, pairs, 2]`."""
    angles = randn(keys, pairs, seed=seed, scale=3.0)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def int32(values) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


class Ring(NamedTuple):
    """Rows of one layer in a ring, in the form the ops read, and their contents.

    `valid` `[B, num_keys, W]` holds the rows of the valid keys in reading order, in float64, after quantization if the
    ring is int8. Everything else in the ring is NaN (int8: NaN scales).
    """

    rows: Tensor
    scales: Tensor | None
    slots: Tensor
    num_keys: Tensor
    valid: Tensor


def ring(
    width: int,
    dtype: torch.dtype,
    batch: int = 2,
    tokens: int = 7,
    slots: tuple[int, ...] = (0, 3, 4, 1),
    window: int = 5,
    tail: int = 3,
    quantized: bool = False,
    seed: int = 0,
    scale: float = 1.0,
    mixed: tuple[int, int] | None = None,
) -> Ring:
    """A ring of `window` slots that has wrapped: a sink in slot 0, a stale slot 2, the last `tail` keys invalid.

    `mixed` is the number of latents in 8 bits, if the others have 4, and their total number.
    """
    keys = len(slots) * tokens - tail
    values = randn(batch, len(slots) * tokens, width, dtype=dtype, seed=seed, scale=scale)
    scales = None
    place = torch.tensor(slots, device=DEVICE)
    if quantized or mixed:
        steps, found = quantize_rows(values, *(mixed or ()))
        valid = dequantize_rows(steps, found, torch.float64, *(mixed or ()))
        found[:, keys:] = float("nan")
        rows = torch.full((batch, window, tokens, steps.shape[-1]), -128, dtype=torch.int8, device=DEVICE)
        rows[:, place] = steps.unflatten(1, (len(slots), tokens))
        scales = found.new_full((batch, window, tokens, found.shape[-1]), float("nan"))
        scales[:, place] = found.unflatten(1, (len(slots), tokens))
    else:
        valid = values.double()
        values[:, keys:] = float("nan")
        rows = values.new_full((batch, window, tokens, width), float("nan"))
        rows[:, place] = values.unflatten(1, (len(slots), tokens))
    return Ring(rows, scales, int32(slots), int32([keys]), valid[:, :keys])


TABLES = ((0, 3, 4, 1), (0, 4, 1, 2))
"""Slots of two items whose rings have wrapped differently."""


def with_tables(cached: Ring, pooled: bool, window: int = 5, lanes: tuple[int, int] = (2, 0)) -> Ring:
    """The two items of a ring, each with its own table of slots: in separate rings, or in lanes of a pool of three.

    A pool is one ring for all items, with slots numbered through all lanes. Everything that no table names is NaN.
    """
    places = [[slot + pooled * lane * window for slot in table] for table, lane in zip(TABLES, lanes)]  # noqa: B905

    def moved(kept: Tensor | None, empty: float) -> Tensor | None:
        if kept is None:
            return None
        rings = (1, 3 * window) if pooled else (2, window)
        target = torch.full((*rings, *kept.shape[2:]), empty, dtype=kept.dtype, device=kept.device)
        for item, place in enumerate(places):
            target[0 if pooled else item, torch.tensor(place, device=DEVICE)] = kept[item, cached.slots]
        return target

    empty = float("nan") if cached.scales is None else -128
    return cached._replace(
        rows=moved(cached.rows, empty), scales=moved(cached.scales, float("nan")), slots=int32(places)
    )
