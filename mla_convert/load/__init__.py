"""Loads a checked source, its configuration and lazy tensors, from a folder, a Hub ID or a single file."""

from .adapters import AdapterConfig
from .build import accepted_config, build_model, check_tensors
from .recognise import known_config
from .source import Source, check_finite, load_dense, load_source
from .tensors import LazyTensors
from .weights import open_weights, read_config, read_json

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
