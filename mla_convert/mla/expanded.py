"""The histories that kernels have expanded to every head's keys and values, and the memory that holds them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

Chunk = tuple[int, int]
"""Its first frame and how many it has: what a history lies before."""


class ExpandedHistories:
    """Workspaces of a cache's layers: one that all share, or where `keep` says so one for each.

    A layer with its own finds its history there in the later passes of a chunk. `keep` is None while nobody has
    decided; it costs the memory of a workspace a layer.
    """

    def __init__(self) -> None:
        self.keep: bool | None = None
        self._tensors: dict[tuple[int, str], Tensor] = {}
        self._chunks: dict[int, Chunk] = {}

    def tensor(self, layer: int, name: str, shape: tuple[int, ...], dtype: torch.dtype, place: torch.device) -> Tensor:
        """The memory called `name` of a layer's workspace, uninitialised where it is new."""
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
        """Take down that the workspaces of `layers` hold the history of `chunk` from now on."""
        if self.keep:
            self._chunks.update(dict.fromkeys(layers, chunk))

    def forget(self) -> None:
        """No workspace holds a history any more; the memory stays."""
        self._chunks = {}
