"""The dense model that a recipe names."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..load import Source, load_source
from ..recipe.schema import SourceConfig


def source_of(section: SourceConfig, causal: dict[str, Any] | None) -> Source:
    """The model of a recipe's `source`, located and checked, for its noise levels. Raises UserError in one line."""
    found = load_source(
        section.model,
        section.subfolder,
        section.revision,
        causal,
        section.file,
        section.use_ema,
        section.adapters,
    )
    return dataclasses.replace(found, noise_range=section.noise_range)
