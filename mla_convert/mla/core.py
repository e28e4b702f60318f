"""Defines causal attention over history and the current chunk, in eager torch.

Faster implementations (`kernels.py`) must equal these functions. Shape letters: B batch, Q queries, K keys, H heads,
D key channels, V value channels, N unrotated and R rotated channels of a key (D = N + R).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .rope import rotate


class KeyValue(NamedTuple):
    """Values, and keys split into unrotated and rotary parts, before any rotation that depends on when they are read.

    `nope` `[B, K, H, N]` enters the logits unrotated. `rope` `[B, K, H or 1, R]` is rotated when it is read. `value` is
    `[B, K, H, V]`. A shared rotary key has one head: DeepSeek's `k_pe` (arXiv 2405.04434, eq. 14-18). `pairs`, int64,
    lists the model's rotary pairs that the channels of `rope` belong to; None means all of them in order. `mean`
    `[H, M]` is a constant part of every key with all rotary pairs.
    """

    nope: Tensor | None
    rope: Tensor | None
    value: Tensor
    pairs: Tensor | None = None
    mean: Tensor | None = None

    def keys(self, rotations: Tensor) -> Tensor:
        """Rotated keys, ready for the dot product: `[B, K, H, N + R + M]`."""
        batch, _, heads = self.value.shape[:3]
        parts = [] if self.nope is None else [self.nope]
        if self.rope is not None:
            rope = rotate(self.rope, of_pairs(rotations, self.pairs))
            parts.append(rope.expand(-1, -1, heads, -1))
        if self.mean is not None:
            turned = rotate(self.mean[None, None], rotations)
            parts.append(turned.to(self.value.dtype).expand(batch, -1, -1, -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def tokens(self, slices: tuple[slice, ...], items: int | None = None) -> KeyValue:
        """The tokens in `slices`, in that order, of all items or of the first `items`."""

        def pick(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            return x[:items, slices[0]] if len(slices) == 1 else torch.cat([x[:items, s] for s in slices], dim=1)

        value = pick(self.value)
        assert value is not None
        return KeyValue(pick(self.nope), pick(self.rope), value, self.pairs, self.mean)


class Expansion(NamedTuple):
    """Channels per head of the keys and values that a layer restores from its cache, in the order of `KeyValue.keys`.

    A key has `nope` channels restored per head, `shared` channels of a key that all heads share and `mean` channels of
    a constant key. A value has `value` channels. With `one_query`, the queries of the chunk's dense keys also address
    the restored keys.
    """

    nope: int
    shared: int
    mean: int
    value: int
    one_query: bool

    @property
    def key(self) -> int:
        """Channels of a key."""
        return self.nope + self.shared + self.mean


class Query(NamedTuple):
    """Queries split like the keys of a `KeyValue`; `rope` and `mean` have every head."""

    nope: Tensor | None
    rope: Tensor | None
    pairs: Tensor | None = None
    mean: Tensor | None = None

    def tokens(self, chosen: slice) -> Query:
        """The queries of some tokens."""

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:, chosen]

        return Query(pick(self.nope), pick(self.rope), self.pairs, pick(self.mean))

    def rotated(self, rotations: Tensor) -> Tensor:
        """Rotated queries, ready for the dot product: `[B, Q, H, N + R + M]`."""
        parts = [] if self.nope is None else [self.nope]
        if self.rope is not None:
            parts.append(rotate(self.rope, of_pairs(rotations, self.pairs)))
        if self.mean is not None:
            parts.append(rotate(self.mean, rotations))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def of_pairs(rotations: Tensor, pairs: Tensor | None) -> Tensor:
    """Rotations `[S, P]` of some pairs, `[S, len(pairs)]`; None means all of them."""
    return rotations if pairs is None else rotations[:, pairs]


class Segment(NamedTuple):
    """Keys and values with the queries for them: `[B, Q, H, D]`, `[B, K, H, D]`, `[B, K, H, V]`."""

    query: Tensor
    key: Tensor
    value: Tensor


def attend(segments: list[Segment], scale: float) -> Tensor:
    """Attention output `[B, Q, H, V]` of one softmax over the keys of all segments.

    Segments may have different queries (history through the latent, the own chunk densely). Such queries are
    concatenated along the channels, and keys are padded with zeros in the channels of the other segments. So one fused
    attention call is enough.
    """
    if len(segments) == 1:
        query, key, value = segments[0]
    else:
        value = torch.cat([segment.value for segment in segments], dim=1)
        if all(segment.query is segments[0].query for segment in segments):
            query = segments[0].query
            key = torch.cat([segment.key for segment in segments], dim=1)
        else:
            query = torch.cat([segment.query for segment in segments], dim=-1)
            widths = [segment.key.shape[-1] for segment in segments]
            key = torch.cat(
                [F.pad(segment.key, (sum(widths[:i]), sum(widths[i + 1 :]))) for i, segment in enumerate(segments)],
                dim=1,
            )
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale=scale)
    return out.transpose(1, 2)
