"""Formats numbers and layouts for the report and comparison pages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..sizes import format_bytes

DASH, MINUS, SPACE = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"


def plain(value: Any) -> str:
    """Format a value of the layout; a list of equal entries is written once."""
    if isinstance(value, list) and value and all(entry == value[0] for entry in value):
        return f"{plain(value[0])} in each of {len(value)} layers" if len(value) > 1 else plain(value[0])
    if isinstance(value, list):
        return ", ".join(plain(entry) for entry in value)
    return DASH if value is None else str(value)


def brief(value: Any) -> str:
    """Format a value of the layout in a word or two; a list of numbers becomes its range."""
    if isinstance(value, list) and value and all(isinstance(entry, int | float) for entry in value):
        low, high = min(value), max(value)
        return f"{low:g}" if low == high else f"{low:g} to {high:g}"
    return plain(value)


def layout_parts(layout: Mapping[str, Any]) -> list[str]:
    """The layout of a report as short phrases."""
    names = {"position": "{}", "own_chunk": "own chunk {}", "kv_lora_rank": "rank {}"}
    parts = [text.format(brief(layout[key])) for key, text in names.items() if layout.get(key) is not None]
    shared = layout.get("layers_per_latent") or 1
    return [*parts, f"one latent for {shared} layers"] if shared > 1 else parts


def times_training(length: str) -> float:
    """The number in a length such as `8x`, to sort lengths by."""
    return float(length.rstrip("x"))


def length_text(text: str) -> str:
    """Format a rollout length such as `8x`; `1x` is the length of a training clip."""
    return "training length" if text == "1x" else f"{text.rstrip('x')}× length"


def bytes_text(count: float) -> str:
    """Format a byte count with its unit."""
    return format_bytes(count).replace(" ", SPACE)


def percent(share: float) -> str:
    """Format a share as `12.3 %`; below 1 % with two significant digits, as `0.30 %`."""
    hundred = 100 * share
    return (
        f"{digits_text(hundred, 2)}{SPACE}%" if 0 < abs(hundred) < 1 else f"{hundred:.1f}{SPACE}%".replace("-", MINUS)
    )


def rough_percent(share: float) -> str:
    """Format a share from 0 with two significant digits and plain zeros for a terminal: `0.35 %`, `38 %`, `3,700 %`."""
    rounded = float(f"{100 * share:.2g}")
    if not math.isfinite(rounded):
        return "not finite"
    if 0 < rounded < 0.01:
        return "below 0.01 %"
    return f"{rounded:,.0f} %" if rounded >= 100 else f"{rounded:g} %"


def digits_text(value: float, digits: int) -> str:
    """Format a number with `digits` significant digits, trailing zeros included: 0.53 with three is `0.530`."""
    text = f"{abs(value):#.{digits}g}".rstrip(".")
    return f"{MINUS}{text}" if value < 0 else text


def share_text(share: float | None) -> str:
    """Format a share; None becomes a dash."""
    return DASH if share is None else percent(share)


def signed(share: float) -> str:
    """Format a relative change with its sign."""
    return f"{MINUS if share < 0 else '+'}{percent(abs(share))}"


def change_text(share: float, decimals: int) -> str:
    """Format a relative change with its sign for a terminal: `-92.7 %`."""
    # Adding zero makes -0.0 positive.
    return f"{100 * share + 0:+.{decimals}f} %"


def factor(ratio: float, above: str, below: str) -> tuple[float, str]:
    """A ratio, or its inverse if that is above 1, and the word for this direction."""
    return (ratio, above) if ratio >= 1 else (1 / ratio, below)


def points_text(share: float) -> str:
    """Format the difference of two shares in percentage points."""
    sign = MINUS if share < 0 else "+"
    return f"{sign}{100 * abs(share):.1f} points"
