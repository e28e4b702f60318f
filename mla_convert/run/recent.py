"""Keeps the chunks that are in a ring, to write them again for a new prompt (KV-recache, arXiv 2509.22622)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import UsageError


class RecentChunks:
    """The chunks that a ring still holds whole, as written: first frame, chunk `[B, C, F, H, W]` and conditions."""

    def __init__(self) -> None:
        self._chunks: deque[tuple[int, Tensor, Mapping[str, Tensor]]] = deque()

    def __iter__(self) -> Iterator[tuple[int, Tensor, Mapping[str, Tensor]]]:
        return iter(self._chunks)

    def add(self, first: int, written: Tensor, first_kept: int, conditions: Mapping[str, Tensor]) -> None:
        """Add the chunk that begins at frame `first`, and drop chunks that begin before `first_kept`."""
        self._chunks.append((first, written, conditions))
        while self._chunks and self._chunks[0][0] < first_kept:
            self._chunks.popleft()


def check_rewinds(recache: bool, caches: Sequence[Any]) -> None:
    """Raise UsageError if `recache` is set and a cache cannot be rewound."""
    other = next((type(cache).__name__ for cache in caches if not cache.is_ring), None)
    if recache and other is not None:
        raise UsageError(
            f"a {other} cannot be written again for a new prompt, but encodes its near history again after every chunk "
            "anyway; leave recache out"
        )
