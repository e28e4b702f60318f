"""Convert a dense causal transformer to latent attention, before any training.

Names are imported on first access, because the keys of a recipe are checked without the models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import on_access

if TYPE_CHECKING:
    from .clips import CalibrationBatch as CalibrationBatch
    from .clips import clip_batches as clip_batches
    from .config import ConvertConfig as ConvertConfig
    from .streaming import Converted as Converted
    from .streaming import convert_source as convert_source
    from .surgery import convert_model as convert_model

_PLACES = {
    "CalibrationBatch": "clips",
    "ConvertConfig": "config",
    "Converted": "streaming",
    "clip_batches": "clips",
    "convert_model": "surgery",
    "convert_source": "streaming",
}

__all__ = sorted(_PLACES)
__getattr__, __dir__ = on_access(__name__, _PLACES)
