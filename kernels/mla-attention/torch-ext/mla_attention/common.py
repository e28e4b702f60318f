"""Parts that several ops share: of kernels, compiled with each of them, and of references."""

from __future__ import annotations

import torch
from torch import Tensor

from ._runtime import jit, tl


@jit
def valid_keys(num_keys, keys):
    """How many of `keys` keys count: all without `num_keys`, a number on the device."""
    if num_keys is None:
        return keys
    else:
        return tl.minimum(tl.load(num_keys), keys)


@jit
def nibbles(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Unpack int8 `[ROWS, COLUMNS / 2]` to signed 4-bit numbers `[ROWS, COLUMNS]`, the low half of a byte first."""
    return tl.reshape(tl.join((x << 4) >> 4, x >> 4), [ROWS, COLUMNS])


@jit
def rotate_pairs(x, turn, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEADS: tl.constexpr = 1):
    """Rotate the channel pairs of `[ROWS, HEADS COLUMNS]` by `turn` `[ROWS, COLUMNS]`, the same for all heads.

    cos and sin are interleaved like the pairs.
    """
    cos, sin = tl.split(tl.reshape(turn, [ROWS, COLUMNS // 2, 2]))
    cos, sin = cos[:, None, :], sin[:, None, :]
    x, y = tl.split(tl.reshape(x, [ROWS, HEADS, COLUMNS // 2, 2]))
    return tl.reshape(tl.join(x * cos - y * sin, x * sin + y * cos), [ROWS, HEADS * COLUMNS])


@jit
def softmax_step(logits, total, top, scale_log2, live, MASKED: tl.constexpr):
    """One step of the online softmax: weights of new logits, the factor of older sums, the new sum and maximum by row.

    `top` is in units of log2. If MASKED, logits of keys that are not `live` do not count.
    """
    if MASKED:
        logits = tl.where(live[None, :], logits, float("-inf"))
    # The scale is positive, so it commutes with the maximum: one multiply-add per logit.
    highest = tl.maximum(top, tl.max(logits, 1) * scale_log2)
    weights = tl.exp2(logits * scale_log2 - highest[:, None])
    shrink = tl.exp2(top - highest)
    return weights, shrink, total * shrink + tl.sum(weights, 1), highest


def rotate(x: Tensor, rotations: Tensor, direction: float = 1.0) -> Tensor:
    """Rotate the pairs of `[B, N, H, 2 P]` by `[N, P, 2]` (cos, sin); `direction` -1 inverts the rotation."""
    cos, sin = rotations.to(x.dtype).unsqueeze(1).unbind(-1)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    sin = sin * direction
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
