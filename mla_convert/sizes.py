"""Format byte counts and durations, and name the memory of GPUs and how much of it estimates leave free."""

from __future__ import annotations

import math

RESERVED_BYTES = 10**9
"""GPU memory reserved for what is not counted: the CUDA context, workspaces, fragmentation."""

GPU_GIGABYTES = {
    "RTX 4090": 24,
    "A100 40": 40,
    "L40S": 48,
    "A100 80": 80,
    "H100": 80,
    "H200": 141,
    "B200": 180,
}
"""Nominal memory in decimal gigabytes; the real memory is at least as large."""

PRESET_NAMES = (
    "wan2.1-t2v-1.3b",
    "wan2.1-t2v-14b",
    "anyflow-far-1.3b",
    "skyreels-v2-1.3b",
    "skyreels-v2-14b",
    "digits",
)
"""The models of `evaluate.geometry.PRESETS`, for help texts that import nothing."""


def format_bytes(count: float, like: float | None = None) -> str:
    """Format bytes in decimal units with about three digits, `6.04 GB`; in the unit of `like` if given."""
    power = min(int(math.log10(max(count if like is None else like, 1)) // 3), 4)
    if like is None and power < 4 and count >= 999.5 * 1000**power:
        # It would be rounded to 1000 of this unit.
        power += 1
    value = count / 1000**power
    digits = 0 if power == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    text = f"{value:.{digits}f}" if value < 1e6 else f"{value:.3g}"
    return f"{text} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def format_count(count: int) -> str:
    """Format a number of things, `1,560`; in powers of ten from a million millions on."""
    return f"{count:,}" if count < 10**12 else f"{count:.3g}"


def duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
