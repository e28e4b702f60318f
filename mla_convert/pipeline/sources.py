"""Locates the dense model that a recipe names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..errors import UserError
from ..load import Source, load_source
from ..load.hub import is_hub_id
from ..mla.window import CausalConfig
from ..recipe.schema import SourceConfig


def source_of(section: SourceConfig, causal: CausalConfig | None) -> Source:
    """Locate and check the model of a recipe's `source` or `real_score`, with its noise range and components.

    Raises UserError in one line.
    """
    found = load_source(
        section.model,
        section.subfolder,
        section.revision,
        None if causal is None else causal.model_dump(mode="json"),
        section.file,
        section.use_ema,
        section.adapters,
    )
    if section.components is not None and not (Path(section.components).is_dir() or is_hub_id(section.components)):
        raise UserError(f"source.components: {section.components} is neither a folder nor a Hub ID (owner/name)")
    return dataclasses.replace(found, noise_range=section.noise_range, components=section.components)
