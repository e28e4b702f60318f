"""What sections of a recipe say of how a model is sampled."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from .flow import check_steps


def _as_tuple(value: Any) -> Any:
    # A strict tuple refuses the list that comes through a section which has looked at its keys before.
    return tuple(value) if isinstance(value, list) else value


DenoisingSteps = Annotated[tuple[int, ...], BeforeValidator(_as_tuple), AfterValidator(check_steps)]
"""Noise levels out of 1000, before any shift, that fall inside [1, 1000]."""
