"""Define what a latent has to restore for a token in each layout: a linear function of its key and value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..mla.attention import DenseSelfAttention
from ..mla.rope import rotate
from .config import ConvertConfig
from .probe import FIELDS, LayerSample
from .rope_key import (
    SharedKey,
    check_rotary_key,
    complex_pairs,
    fastest_pairs,
    mean_keys,
    mean_rotation,
    rotated_pairs,
    shared_keys,
)

TOKENS_AT_ONCE = 4096


@dataclass
class Target:
    """The linear map from keys `[T, H, D]` and values `[T, H, D]` to what a latent has to restore, `[T, n]`."""

    shared: SharedKey | None
    nope_pairs: list[int]
    rho: Tensor
    residual: bool
    derived: bool

    def rest(self, key: Tensor) -> Tensor:
        """The pairs of keys `[T, H, D]` as complex128 `[T, H, P]`.

        If the latent restores the residual, what the shared key restores is subtracted.
        """
        pairs = complex_pairs(key)
        if self.shared is not None and self.residual:
            pairs = pairs.clone()
            restored = torch.einsum("tj,jh->thj", self.kappa(key), self.shared.decoder)
            for j, pair in enumerate(self.shared.pairs):
                pairs[:, :, pair] -= restored[:, :, j]
        return pairs

    def nope(self, key: Tensor) -> Tensor:
        """What the unrotated channels restore, `[T, n]`."""
        return torch.view_as_real((self.rest(key) * self.rho)[:, :, self.nope_pairs]).flatten(1)

    def kappa(self, key: Tensor) -> Tensor:
        """The shared rotary key, complex128 `[T, R]`."""
        assert self.shared is not None
        return torch.einsum("thj,jh->tj", complex_pairs(key)[:, :, self.shared.pairs], self.shared.encoder)

    def __call__(self, key: Tensor, value: Tensor) -> Tensor:
        parts = [self.nope(key)]
        if self.derived:
            parts.append(torch.view_as_real(self.kappa(key)).flatten(1))
        return torch.cat([*parts, value.double().flatten(1)], dim=1)

    def size(self, heads: int, head_dim: int) -> int:
        """The size of the target, in numbers per token."""
        shared = 2 * len(self.shared.pairs) if self.derived and self.shared is not None else 0
        return 2 * heads * len(self.nope_pairs) + shared + heads * head_dim

    def probes(self, sample: LayerSample) -> Tensor:
        """Each token's K probes as gradients with respect to its target, `[T * K, n]`."""
        parts = [torch.view_as_real(complex_pairs(sample.fixed_grad)[:, :, self.nope_pairs]).flatten(1)]
        if self.derived:
            assert self.shared is not None
            turned = complex_pairs(sample.rotated_grad)[:, :, self.shared.pairs]
            parts.append(torch.view_as_real(torch.einsum("thj,jh->tj", turned, self.shared.decoder.conj())).flatten(1))
        return torch.cat([*parts, sample.value_grad.double().flatten(1)], dim=1)


Read = Sequence[tuple[Target, LayerSample]]
"""Layers that share a latent: each one's target and its sample, transformed by `as_read`; all at the same tokens."""


def size(layers: Read) -> int:
    """How many numbers per token a latent has to restore."""
    return sum(target.size(*sample.key.shape[1:]) for target, sample in layers)


def moments(layers: Read, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Covariance `[n, n]`, mean `[n]` and metric `[n, n]` of what a latent restores, float64 on `device`.

    Tokens that the output depends on count more, because they are not like the others: a token's weight is 1 plus the
    mean square of its probes divided by that of all tokens.
    """
    pieces, count = _pieces(layers), len(layers[0][1].value_grad)
    energy = sum(float(_probes(piece).square().sum()) for piece in pieces) / count
    metric, second, first, total = torch.zeros(4, device=device).unbind()
    for piece in pieces:
        numbers, probes = _numbers(piece).to(device), _probes(piece).to(device)
        weight = _token_weights(probes, energy, len(numbers))
        metric = metric + probes.T @ probes
        second = second + numbers.T @ (weight.unsqueeze(1) * numbers)
        first, total = first + weight @ numbers, total + weight.sum()
    mean = first / total
    return second / total - torch.outer(mean, mean), mean, metric / count


def tokens(layers: Read) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the numbers `[t, n]` that a latent restores and their probes `[t * K, n]`, float64, some tokens at once."""
    for piece in _pieces(layers):
        yield _numbers(piece), _probes(piece)


def factors(layers: Read, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The `moments` as factors: X, mean and G, where `X^T X` is the covariance and `G^T G` the metric.

    X is `[T, n]`, the mean `[n]` and G `[T * K, n]`, all float64 on `device`.
    """
    sample = layers[0][1]
    numbers, probes = (
        torch.empty(rows, size(layers), dtype=torch.float64, device=device)
        for rows in (len(sample.hidden), len(sample.value_grad))
    )
    start = 0
    for piece in _pieces(layers, TOKENS_AT_ONCE // 8):
        stop = start + len(piece[0][1].hidden)
        numbers[start:stop] = _numbers(piece).to(device)
        probes[start * sample.probes : stop * sample.probes] = _probes(piece).to(device)
        start = stop
    share = _token_weights(probes, float(probes.square().sum()) / len(probes), len(numbers))
    share /= share.sum()
    mean = share @ numbers
    return numbers.sub_(mean).mul_(share.sqrt().unsqueeze(1)), mean, probes.div_(len(probes) ** 0.5)


def _numbers(layers: Read) -> Tensor:
    """The numbers that a latent has to restore for each token, `[T, n]`."""
    return _concatenated([target(sample.key, sample.value) for target, sample in layers])


def _probes(layers: Read) -> Tensor:
    return _concatenated([target.probes(sample) for target, sample in layers])


def _concatenated(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def as_read(sample: LayerSample, config: ConvertConfig) -> tuple[LayerSample, Tensor | None]:
    """Transform a sample to the keys that the layout caches and the gradients of how it reads them.

    Returns the sample and, if the layout stores the mean key separately, that key `[H, D]`.
    """
    mean = None
    if config.keeps_key_mean:
        sample, mean = centered(sample)
    if config.position == "baked":
        sample = baked(sample)
    if config.position == "rotate_on_read":
        sample = replace(sample, fixed_grad=sample.rotated_grad)
    return sample, mean


def layout_target(
    layer: DenseSelfAttention, sample: LayerSample | None, axes: tuple[int, ...], config: ConvertConfig
) -> Target:
    """The target of the layout; its shared rotary key is fitted to `sample` (transformed by `as_read`) if any.

    `axes` is the axis of each rotary pair. Raises ValueError for a rotary key larger than the layer has.
    """
    pairs, count = layer.head_dim // 2, config.qk_rope_head_dim // 2
    untouched = torch.ones(layer.heads, pairs, dtype=torch.complex128)
    if config.position == "rotate_on_read":
        return Target(None, list(range(pairs)), untouched, residual=False, derived=False)
    check_rotary_key(config, layer.heads, axes)
    candidates = rotated_pairs(config.position, axes)
    if sample is None:
        chosen = fastest_pairs(tuple(axes[p] for p in candidates), count)
        shared, rho, residual = mean_keys([candidates[p] for p in chosen], layer.heads), untouched, False
    else:
        residual = config.keep_residual
        shared, rho = shared_keys(sample, count, candidates, residual), mean_rotation(sample)
    in_shared_key = set() if residual else set(shared.pairs)
    nope_pairs = [p for p in range(pairs) if p not in in_shared_key]
    return Target(shared, nope_pairs, rho, residual, config.position == "derived")


def centered(sample: LayerSample) -> tuple[LayerSample, Tensor]:
    """Subtract the mean key from a sample; return both. Tokens are weighted as in `moments`, the key is `[H, D]`."""
    energy = sample.rotated_grad.double().square().sum((1, 2)).view(-1, sample.probes).mean(1)
    weight = 1 + energy / energy.mean().clamp_min(1e-300)
    mean = (torch.einsum("t,thd->hd", weight, sample.key.double()) / weight.sum()).float()
    return replace(sample, key=sample.key - mean), mean


def baked(sample: LayerSample) -> LayerSample:
    """Transform a sample for a layout whose cached keys already have their spatial rotation."""
    return replace(
        sample,
        key=_turn(sample.key, sample.place),
        rotated_grad=_turn(sample.rotated_grad, sample.place.repeat_interleave(sample.probes, dim=0)),
        fixed_grad=sample.placed_grad,
    )


def _turn(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate each token of `[T, H, D]` by its own rotation, `[T, P]`."""
    return rotate(x.unsqueeze(0), rotations)[0]


def _token_weights(probes: Tensor, energy: float, tokens: int) -> Tensor:
    return 1 + probes.square().sum(1).view(tokens, -1).mean(1) / max(energy, 1e-300)


def _pieces(layers: Read, tokens: int = TOKENS_AT_ONCE) -> list[Read]:
    """Split the samples into pieces of at most `tokens` tokens, because they are processed in float64."""

    def pieces(sample: LayerSample) -> Iterator[LayerSample]:
        names = [name for name in FIELDS if name != "queried"]
        parts = (getattr(sample, name) for name in names)
        for piece in zip(*(x.split(tokens * (len(x) // len(sample.hidden))) for x in parts), strict=True):
            yield replace(sample, **dict(zip(names, piece, strict=True)))

    targets, samples = zip(*layers, strict=True)
    return [list(zip(targets, piece, strict=True)) for piece in zip(*map(pieces, samples), strict=True)]
