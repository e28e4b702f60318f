"""Holds the histories that kernels have expanded to every head's keys and values."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .window import Chunk


class ExpandedHistories:
    """Workspaces for a cache's expanded histories: one for all layers, or with `keep` one per layer.

    A layer with its own workspace finds its history there in the later passes of a chunk. That costs the memory of one
    workspace per layer. `keep` is None until this is decided.
    """

    def __init__(self) -> None:
        self.keep: bool | None = None
        self._tensors: dict[tuple[int, str], Tensor] = {}
        self._chunks: dict[int, Chunk] = {}

    def tensor(self, layer: int, name: str, shape: tuple[int, ...], dtype: torch.dtype, place: torch.device) -> Tensor:
        """The tensor called `name` of a layer's workspace, uninitialized when new."""
        owner = layer if self.keep else 0
        kept = self._tensors.get((owner, name))
        if kept is None or kept.shape != shape:
            kept = self._tensors[owner, name] = torch.empty(shape, dtype=dtype, device=place)
            self._chunks.pop(owner, None)
        return kept

    def holds(self, layer: int, chunk: Chunk) -> bool:
        """Whether a layer's workspace holds the history of `chunk`."""
        return bool(self.keep) and self._chunks.get(layer) == chunk

    def filled(self, layers: Iterable[int], chunk: Chunk) -> None:
        """Record that the workspaces of `layers` now hold the history of `chunk`."""
        if self.keep:
            self._chunks.update(dict.fromkeys(layers, chunk))

    def forget(self) -> None:
        """Mark every workspace as empty; the memory stays allocated."""
        self._chunks = {}
