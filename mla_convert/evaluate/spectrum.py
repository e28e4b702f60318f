"""Computes how many directions a layer's weights, its keys and values, and its output use.

An energy is a squared singular value. VideoMLA (arXiv 2605.30351) studies the spectrum of the stacked `[W_K; W_V]`.
The loss of a conversion depends on the spectrum of the keys and values on calibration clips, and on their spectrum
as the attention output sees them. Shape letters: I = heads * head_dim, C model width, T tokens, H heads, P rotary
pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..convert.probe import LayerSample
from ..convert.rope_key import complex_pairs, mean_rotation

LEVEL = 0.99
"""Share of the energy that defines `rank99_*`."""

AXES = ("t", "h", "w")


@dataclass(frozen=True)
class Spectrum:
    """Energies `[n]` of n directions in descending order, float64, not negative."""

    energy: Tensor

    def rank(self, level: float = LEVEL) -> int:
        """The fewest directions that hold `level` of the energy; 0 if there is no energy."""
        total = self.energy.sum()
        if not total > 0:
            return 0
        # Allow for rounding, so that a flat spectrum does not need one more direction.
        return int((self.energy.cumsum(0) < (level - 1e-12) * total).sum()) + 1

    def kept(self, rank: int) -> float:
        """The share of the energy in the first `rank` directions, 0 to 1; 1 if there is no energy."""
        total = self.energy.sum()
        return min(1.0, float(self.energy[:rank].sum() / total)) if total > 0 else 1.0

    def kept_at(self, ranks: Sequence[int]) -> dict[str, float]:
        """`kept` by rank, with string keys for JSON."""
        return {str(rank): self.kept(rank) for rank in ranks}

    def effective_rank(self) -> float:
        """Exp of the entropy of the singular values (Roy and Vetterli, EUSIPCO 2007); 0 if all are 0."""
        values = self.energy.sqrt()
        if not values.sum() > 0:
            return 0.0
        return float(torch.special.entr(values / values.sum()).sum().exp())


def gram_spectrum(*blocks: Tensor) -> Spectrum:
    """The energies of the vertically stacked matrices `[n_i, m]`, from the Gram matrix of the smaller side.

    Computed in float64, one block at a time. At 3072 x 1536, energies differ from an SVD's by 2e-14 of the largest.
    Only singular values below about 1e-7 of the largest are lost, which does not affect shares of the energy.
    """
    if sum(len(block) for block in blocks) < blocks[0].shape[1]:
        stacked = torch.cat(blocks).double()
        gram = stacked @ stacked.T
    else:
        gram = torch.zeros(blocks[0].shape[1], blocks[0].shape[1], dtype=torch.float64)
        for block in blocks:
            wide = block.double()
            gram.addmm_(wide.T, wide)
    return Spectrum(torch.linalg.eigvalsh(gram).flip(0).clamp_min(0))


def activation_spectrum(sample: LayerSample) -> Spectrum:
    """The energies of the tokens' `[k; v]` `[T, 2I]` about their mean; keys are normalized and unrotated."""
    tokens = torch.cat([sample.key.flatten(1), sample.value.flatten(1)], dim=1).double()
    return gram_spectrum((tokens - tokens.mean(0)) / len(tokens) ** 0.5)


def unrotated_error(sample: LayerSample) -> tuple[Tensor, float]:
    """The energy each rotary pair loses if its keys are not rotated, float64 `[P]`, and all pairs' energy.

    The energy of one head's pair is that of its keys about their mean (a constant, which costs no cache to rotate)
    times that of their gradients. The loss is the part that the best unrotated replacement, the key times the
    factor of `mean_rotation`, does not explain.
    """
    key = (sample.key - sample.key.mean(0)).double()
    keys = complex_pairs(key).abs().square().mean(0)
    rotated, fixed = (complex_pairs(x).abs().square().mean(0) for x in (sample.rotated_grad, sample.fixed_grad))
    lost = (rotated - mean_rotation(sample).abs().square() * fixed).clamp_min(0) * keys
    return lost.sum(0), float((rotated * keys).sum())


def rope_pairs(lost: Tensor, axes: Sequence[int]) -> list[dict[str, Any]]:
    """`{pair, axis, share}` of every pair, its share of the loss of all unrotated pairs, largest first."""
    shares = lost / lost.sum() if lost.sum() > 0 else torch.zeros_like(lost)
    rows = [
        {"pair": pair, "axis": AXES[axis], "share": share}
        for pair, (axis, share) in enumerate(zip(axes, shares.tolist(), strict=True))
    ]
    return sorted(rows, key=lambda row: -float(row["share"]))


@dataclass
class LayerSpectra:
    """Spectra of one layer of a dense model; all but `weights` are None without clips.

    `unrotated`, float64 `[P]`, is the energy that each rotary pair loses if it is not rotated; `unrotated_share` is
    the sum of these losses divided by the energy of all pairs.
    """

    weights: Spectrum
    activations: Spectrum | None = None
    output: Spectrum | None = None
    unrotated: Tensor | None = None
    unrotated_share: float | None = None

    def row(self, ranks: Sequence[int], axes: Sequence[int]) -> dict[str, Any]:
        """The numbers that `inspect --json` prints for the layer."""
        row: dict[str, Any] = {
            "directions": len(self.weights.energy),
            "effective_rank_weight": self.weights.effective_rank(),
            "rank99_weight": self.weights.rank(),
            "energy_at": self.weights.kept_at(ranks),
        }
        for name, spectrum in (("activation", self.activations), ("output", self.output)):
            row[f"rank99_{name}"] = None if spectrum is None else spectrum.rank()
            row[f"energy_at_{name}"] = None if spectrum is None else spectrum.kept_at(ranks)
        row["unrotated_share"] = self.unrotated_share
        row["rope_pairs"] = None if self.unrotated is None else rope_pairs(self.unrotated, axes)
        return row
