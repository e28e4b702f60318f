"""Numbers as the pages write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..sizes import format_bytes

DASH, MINUS, SPACE = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"


def plain(value: Any) -> str:
    """A value of the layout; equal entries of a list are said once."""
    if isinstance(value, list) and value and all(entry == value[0] for entry in value):
        return f"{plain(value[0])} in each of {len(value)} layers" if len(value) > 1 else plain(value[0])
    if isinstance(value, list):
        return ", ".join(plain(entry) for entry in value)
    return DASH if value is None else str(value)


def brief(value: Any) -> str:
    """A value of the layout in a word or two; a list of numbers as its range."""
    if isinstance(value, list) and value and all(isinstance(entry, int | float) for entry in value):
        low, high = min(value), max(value)
        return f"{low:g}" if low == high else f"{low:g} to {high:g}"
    return plain(value)


def layout_parts(layout: Mapping[str, Any]) -> list[str]:
    """The layout of a report in a few words each."""
    names = {"position": "{}", "own_chunk": "own chunk {}", "kv_lora_rank": "rank {}"}
    parts = [text.format(brief(layout[key])) for key, text in names.items() if layout.get(key) is not None]
    shared = layout.get("layers_per_latent") or 1
    return [*parts, f"one latent for {shared} layers"] if shared > 1 else parts


def times_training(length: str) -> float:
    """8 for `8x`: the key by which lengths are put in order."""
    return float(length.rstrip("x"))


def length_text(text: str) -> str:
    """`1x`, the length of a training clip, and its multiples."""
    return "training length" if text == "1x" else f"{text.rstrip('x')}× length"


def bytes_text(count: float) -> str:
    """Bytes with their unit."""
    return format_bytes(count).replace(" ", SPACE)


def percent(share: float) -> str:
    """A share as `12.3 %`; two digits below 1 %, as `0.30 %`."""
    hundred = 100 * share
    return (
        f"{digits_text(hundred, 2)}{SPACE}%" if 0 < abs(hundred) < 1 else f"{hundred:.1f}{SPACE}%".replace("-", MINUS)
    )


def digits_text(value: float, digits: int) -> str:
    """A number to so many digits, zeros at its end included: 0.53 to three is `0.530`."""
    text = f"{abs(value):#.{digits}g}".rstrip(".")
    return f"{MINUS}{text}" if value < 0 else text


def share_text(share: float | None) -> str:
    """A share, or a dash for none."""
    return DASH if share is None else percent(share)


def signed(share: float) -> str:
    """A relative change."""
    return f"{MINUS if share < 0 else '+'}{percent(abs(share))}"


def points_text(share: float) -> str:
    """A difference of two shares."""
    sign = MINUS if share < 0 else "+"
    return f"{sign}{100 * abs(share):.1f} points"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
