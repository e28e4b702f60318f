"""Predicts the velocity error of a conversion by layout and number of cached scalars."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..convert.config import ConvertConfig
from ..convert.factorize import low_rank_code
from ..convert.probe import LayerSample
from ..convert.rope_key import complex_pairs
from ..convert.target import Read, Target, moments, tokens
from ..mla.config import Position
from .geometry import PAPER_SCALARS
from .spectrum import LEVEL, Spectrum

TARGET_ERROR = 0.02
"""Largest predicted relative velocity error that the recommendation accepts."""

# Channels of the shared rotary key relative to a head's; VideoMLA uses 32 of 128. Derived keys are not cached.
_SHARED_KEY: dict[Position, float] = {"decoupled": 0.25, "derived": 1.5, "baked": 0.25, "rotate_on_read": 0.0}


def default_ranks(dense: int) -> list[int]:
    """64, 128, 192, 224 (VideoMLA's) and 256 for Wan2.1-1.3B's 3072 dense scalars, scaled to `dense`."""
    step = 16 if dense >= 1024 else 2
    return sorted({max(1, step * round(dense * share / PAPER_SCALARS / step)) for share in (64, 128, 192, 224, 256)})


def layout_config(position: Position, head_dim: int) -> ConvertConfig:
    """The predicted layout: fitted to activations, with an exact own chunk and the usual shared key."""
    channels = 2 * round(_SHARED_KEY[position] * head_dim / 2)
    if position != "rotate_on_read":
        channels = max(2, channels)
    return ConvertConfig(position=position, own_chunk="exact", qk_rope_head_dim=channels)


@dataclass
class Prediction:
    """Predicted error of one layout with the same rank in every layer.

    `error` `[n + 1]` is the squared error of the velocity by rank, relative to the squared velocity. `cached_key` is
    the number of scalars of the shared rotary key in a cache row. `layers` is how many layers share a latent.
    """

    cached_key: int
    error: Tensor
    layers: int = 1

    def relative(self, scalars: int) -> float | None:
        """The relative velocity error predicted at `scalars` cached scalars; None if no latent is left."""
        rank = self.layers * (scalars - self.cached_key)
        if rank < 1:
            return None
        return float(self.error[min(rank, len(self.error) - 1)].clamp_min(0).sqrt())


def recommend(predicted: Mapping[str, Mapping[str, float | None]], dense: int) -> str:
    """Recommend, in one line from `{layout: {scalars: error}}`, the fewest scalars within `TARGET_ERROR`.

    The line also gives the error of the next smaller number of scalars. If none is within the target, the largest
    number is recommended.
    """
    best: dict[int, tuple[float, str]] = {}
    for layout, errors in predicted.items():
        for scalars, error in errors.items():
            if error is not None and (int(scalars) not in best or error < best[int(scalars)][0]):
                best[int(scalars)] = (error, layout)
    if not best:
        return "no layout fits into these ranks; give larger --ranks"
    ordered = sorted(best)
    chosen = next((scalars for scalars in ordered if best[scalars][0] <= TARGET_ERROR), ordered[-1])
    error, layout = best[chosen]
    line = (
        f"{chosen:,} scalars ({100 * chosen / dense:.1f} % of the dense cache), {layout} with an exact own chunk, "
        f"predicted {_percent(error)} velocity error before training"
    )
    for fewer in ordered[: ordered.index(chosen)][-1:]:
        error, other = best[fewer]
        line += f"; {fewer:,} scalars{'' if other == layout else f', {other},'} {_percent(error)}"
    return line


def recommend_by_weights(spectra: Sequence[Spectrum], ranks: Sequence[int]) -> str:
    """One line on the weights alone: directions that hold 99 % of the energy, and what the middle rank keeps."""
    need = [spectrum.rank() for spectrum in spectra]
    rank = ranks[len(ranks) // 2]
    kept = statistics.median(spectrum.kept(rank) for spectrum in spectra)
    span = f"{min(need):,} to {max(need):,}" if min(need) < max(need) else f"{need[0]:,}"
    return (
        f"weights only: {100 * LEVEL:g} % of the energy needs {span} of {len(spectra[0].energy):,} directions, and "
        f"rank {rank:,} keeps {100 * kept:.1f} % in the median layer; "
        "give --data FOLDER to predict errors from clips"
    )


def _percent(share: float) -> str:
    return f"+{100 * share:.2g} %" if share < 0.1 else f"+{100 * share:,.0f} %"


def error_curve(layers: Read, most: int | None = None) -> tuple[Tensor, Tensor]:
    """The squared error `[n + 1]` of a fit with 0 to n latent channels and each channel's energy `[n]`.

    Both are float64 in the gradients' units. n is `most`, or by default all directions of the `layers` that share the
    latent. The error is the mean square of a token's error times its gradient. This is a first-order estimate that
    assumes independent errors of the tokens. The energies, falling, are what the channels hold of `tr(G C)`, the metric
    times the covariance, without what the ridge adds to the metric's eigenvalues.
    """
    covariance, mean, metric = moments(layers)
    count = len(covariance) if most is None else min(most, len(covariance))
    code = low_rank_code(covariance, metric, mean, count)
    weight = (code.decoder * (metric @ code.decoder)).sum(0)
    energy = (weight * ((code.encoder @ covariance) * code.encoder).sum(1)).clamp_min(0)
    del covariance, metric
    error, gradients = energy.new_zeros(count + 1), 0
    for numbers, probes in tokens(layers):
        each = len(probes) // len(numbers)
        centered = (numbers - mean).repeat_interleave(each, dim=0)
        lost = (probes * centered).sum(1, keepdim=True)
        kept = (probes @ code.decoder) * (centered @ code.encoder.T)
        error += torch.cat([lost, lost - kept.cumsum(1)], dim=1).square().sum(0)
        gradients += len(probes)
    return error / gradients, energy


def position_error(target: Target, sample: LayerSample) -> float:
    """The error of a layout with a shared rotary key that no rank removes, in the units of `error_curve`.

    The unrotated channels carry the residual of the keys after the shared key (`keep_residual`), each pair times the
    factor of `mean_rotation`. Unrotated queries read them.
    """
    if target.shared is None:
        return 0.0
    misread = complex_pairs(sample.rotated_grad) - complex_pairs(sample.fixed_grad) * target.rho.conj()
    lost = target.rest(sample.key).repeat_interleave(sample.probes, dim=0)
    return float((misread.conj() * lost).real.sum((1, 2)).square().mean())
