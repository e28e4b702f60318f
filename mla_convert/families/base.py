"""What the rest of the package needs to know about a model family."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Geometry:
    """Self-attention of a dense model."""

    num_layers: int
    num_heads: int
    head_dim: int

    @property
    def dense_scalars_per_token(self) -> int:
        """Cached scalars a token a layer of the dense model: a key and a value for every head."""
        return 2 * self.num_heads * self.head_dim


@dataclass(frozen=True)
class Family:
    """A family of transformers: its stock classes by name, our dense and our converted class.

    `geometry` reads a configuration of any of them. `near_misses` names related classes that cannot
    be converted, each with the reason. `stored_names` maps our tensor names to those of a file that is
    not in diffusers layout, or gives None when it does not know the layout. `infer_config` reads a
    stock configuration off tensor shapes, or gives None when they are of another family; it raises
    UserError when they leave something open.
    """

    name: str
    source_classes: tuple[str, ...]
    dense_class: type[Any]
    mla_class: type[Any]
    geometry: Callable[[Config], Geometry]
    near_misses: Mapping[str, str] = field(default_factory=dict)
    stored_names: Callable[[Collection[str]], dict[str, str] | None] = lambda names: None
    infer_config: Callable[[Shapes], dict[str, Any] | None] = lambda shapes: None
