"""Fit the rotary key that all heads share: which rotary pairs it holds, and how each head writes and reads it.

For one pair, the keys of the H heads are complex numbers. The best single key for all heads is their first left
singular vector, in the metric of the queries that will read it: a complex SVD across heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..mla.config import Position
from ..mla.rope import TIME
from .config import ConvertConfig
from .factorize import symmetric_root
from .probe import LayerSample


def rotated_pairs(position: Position, axes: tuple[int, ...]) -> list[int]:
    """The rotary pairs that a shared key can hold; `axes` is the axis of each pair."""
    return [pair for pair, axis in enumerate(axes) if position != "baked" or axis == TIME]


def check_rotary_key(config: ConvertConfig, heads: int, axes: tuple[int, ...]) -> None:
    """Raise ValueError if the shared rotary key is larger than its layout allows for a layer."""
    limit, owner = 2 * len(rotated_pairs(config.position, axes)), "a head"
    if config.init == "activation":
        # A pair may be chosen as often as there are heads.
        limit, owner = heads * limit, "all heads"
    if config.qk_rope_head_dim > limit:
        raise ValueError(f"{config.qk_rope_head_dim} is larger than the {limit} rotary channels of {owner}")


class SharedKey(NamedTuple):
    """The shared key is `kappa_j = sum_h encoder[j, h] k_{h, pairs[j]}`, and head h reads `decoder[j, h] kappa_j`.

    `pairs` `[R]`; `encoder` and `decoder` complex128 `[R, H]`.
    """

    pairs: list[int]
    encoder: Tensor
    decoder: Tensor


def complex_pairs(x: Tensor) -> Tensor:
    """Real `[..., 2P]` as complex128 `[..., P]`."""
    return torch.view_as_complex(x.double().contiguous().unflatten(-1, (-1, 2)))


def mean_rotation(sample: LayerSample) -> Tensor:
    """Rho, the share of each head's key that remains useful when a pair is not rotated, complex128 `[H, P]`.

    It minimizes the error of reading `rho k` with unrotated queries instead of k with rotated ones. It is near 1 for
    slow pairs and near 0 for fast ones.
    """
    rotated, fixed = complex_pairs(sample.rotated_grad), complex_pairs(sample.fixed_grad)
    return (fixed * rotated.conj()).sum(0) / fixed.abs().square().sum(0).clamp_min(1e-30)


def shared_keys(sample: LayerSample, count: int, candidates: list[int], residual: bool) -> SharedKey:
    """Choose the `count` rotary keys among the pairs `candidates` that remove the most error.

    A pair may be chosen more than once, each time with the next singular vector. With `residual`, the part of a key
    that the unrotated channels can restore does not count. `check_rotary_key` ensures that `count` keys exist.
    """
    key, grad = complex_pairs(sample.key), complex_pairs(sample.rotated_grad)
    lost = torch.ones(key.shape[1:], dtype=torch.float64)
    if residual:
        fixed = complex_pairs(sample.fixed_grad).abs().square().mean(0)
        kept = mean_rotation(sample).abs().square() * fixed / grad.abs().square().mean(0).clamp_min(1e-30)
        lost = (1 - kept).clamp(0, 1)
    options: list[tuple[float, int, Tensor, Tensor]] = []
    for pair in candidates:
        root, inverse = symmetric_root(grad[:, :, pair].T @ grad[:, :, pair].conj() / len(grad))
        weighted = key[:, :, pair] @ root.T
        values, vectors = torch.linalg.eigh(weighted.T @ weighted.conj() / len(weighted))
        for rank in range(len(values)):
            vector = vectors[:, -1 - rank]
            share = (vector.abs().square() * lost[:, pair]).sum()
            # A shared key of unit variance trains at the same rate as other channels and keeps the metric balanced.
            spread = values[-1 - rank].clamp_min(float(values[-1]) * 1e-8 + 1e-30).sqrt()
            encoder, decoder = vector.conj() @ root / spread, inverse @ vector * spread
            options.append((float(values[-1 - rank] * share), pair, encoder, decoder))
    best = sorted(options, key=lambda option: -option[0])[:count]
    best.sort(key=lambda option: option[1])
    return SharedKey(
        [pair for _, pair, _, _ in best],
        torch.stack([encoder for _, _, encoder, _ in best]),
        torch.stack([decoder for _, _, _, decoder in best]),
    )


def mean_keys(pairs: list[int], heads: int) -> SharedKey:
    """The mean over heads as the shared key of each pair, as DeepSeek-style conversions start."""
    ones = torch.ones(len(pairs), heads, dtype=torch.complex128)
    return SharedKey(list(pairs), ones / heads, ones)


def fastest_pairs(axes: tuple[int, ...], count: int) -> list[int]:
    """`count` pairs, taking the highest frequencies of each axis in turn (VideoMLA: (6, 5, 5) for 16)."""
    by_axis = [[pair for pair, axis in enumerate(axes) if axis == which] for which in sorted(set(axes))]
    rounds = [pair for place in range(len(axes)) for axis in by_axis for pair in axis[place : place + 1]]
    return sorted(rounds[:count])
