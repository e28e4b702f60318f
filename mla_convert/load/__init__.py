"""Loads a checked source, its configuration and lazy tensors, from a folder, a Hub ID or a single file.

Names are imported on first access, because the keys of a recipe are checked without the models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import on_access

if TYPE_CHECKING:
    from .adapters import AdapterConfig as AdapterConfig
    from .build import accepted_config as accepted_config
    from .build import build_model as build_model
    from .build import check_tensors as check_tensors
    from .recognize import known_config as known_config
    from .source import Source as Source
    from .source import load_dense as load_dense
    from .source import load_source as load_source
    from .tensors import LazyTensors as LazyTensors
    from .weights import open_weights as open_weights
    from .weights import read_config as read_config
    from .weights import read_json as read_json

_PLACES = {
    "AdapterConfig": "adapters",
    "LazyTensors": "tensors",
    "Source": "source",
    "accepted_config": "build",
    "build_model": "build",
    "check_tensors": "build",
    "known_config": "recognize",
    "load_dense": "source",
    "load_source": "source",
    "open_weights": "weights",
    "read_config": "weights",
    "read_json": "weights",
}

__all__ = sorted(_PLACES)
__getattr__, __dir__ = on_access(__name__, _PLACES)
