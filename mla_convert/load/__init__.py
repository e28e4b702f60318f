"""Loads a checked source, its configuration and lazy tensors, from a folder, a Hub ID or a single file.

Names are imported on first access, because the keys of a recipe are checked without the models.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import AdapterConfig
    from .build import accepted_config, build_model, check_tensors
    from .recognise import known_config
    from .source import Source, check_finite, load_dense, load_source
    from .tensors import LazyTensors
    from .weights import open_weights, read_config, read_json

_PLACES = {
    "AdapterConfig": "adapters",
    "LazyTensors": "tensors",
    "Source": "source",
    "accepted_config": "build",
    "build_model": "build",
    "check_finite": "source",
    "check_tensors": "build",
    "known_config": "recognise",
    "load_dense": "source",
    "load_source": "source",
    "open_weights": "weights",
    "read_config": "weights",
    "read_json": "weights",
}

__all__ = [
    "AdapterConfig",
    "LazyTensors",
    "Source",
    "accepted_config",
    "build_model",
    "check_finite",
    "check_tensors",
    "known_config",
    "load_dense",
    "load_source",
    "open_weights",
    "read_config",
    "read_json",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
