"""Names of data types: torch's, and the short ones that options and recipes also take."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from .errors import UsageError, quoted

NAMES = ("float32", "bfloat16", "float16")
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def full_name(name: Any) -> Any:
    """Torch's name for a short one; anything else as it is."""
    return _SHORT.get(name, name) if isinstance(name, str) else name


def checked(what: str, name: str, allowed: Sequence[str] = NAMES) -> str:
    """Torch's name of a data type. Raises UsageError, which names `what`, if it is not one of `allowed`."""
    full: str = full_name(name)
    if full not in allowed:
        *most, last = map(repr, allowed)
        matches = difflib.get_close_matches(name, allowed, n=1)
        hint = f"; did you mean {matches[0]}?" if matches else ""
        raise UsageError(f"{what}: expected {', '.join(most)} or {last}, got {quoted(name)}{hint}")
    return full
