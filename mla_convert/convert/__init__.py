"""Convert a dense causal transformer to latent attention, before any training.

Names are imported on first access, because the keys of a recipe are checked without the models.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .clips import CalibrationBatch, clip_batches
    from .config import ConvertConfig
    from .streaming import Converted, convert_source
    from .surgery import convert_model

_PLACES = {
    "CalibrationBatch": "clips",
    "ConvertConfig": "config",
    "Converted": "streaming",
    "clip_batches": "clips",
    "convert_model": "surgery",
    "convert_source": "streaming",
}

__all__ = [
    "CalibrationBatch",
    "ConvertConfig",
    "Converted",
    "clip_batches",
    "convert_model",
    "convert_source",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
