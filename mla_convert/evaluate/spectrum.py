"""How many directions a layer's weights, its keys and values, and its output really use.

An energy is a squared singular value. The spectrum of the stacked `[W_K; W_V]` is what VideoMLA
(arXiv 2605.30351) looks at; that of the keys and values on calibration clips, and that of the same
seen through the attention's output, are what a conversion loses. Shape letters: I = heads *
head_dim, C width of the model, T tokens, H heads, P rotary pairs.
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
"""Share of the energy that `rank99_*` asks for."""

AXES = ("t", "h", "w")


@dataclass(frozen=True)
class Spectrum:
    """`energy` `[n]` of n directions, falling, float64 and not negative."""

    energy: Tensor

    @classmethod
    def of_curve(cls, curve: Tensor) -> Spectrum:
        """From the squared error `[n + 1]` that is left with the best 0 to n directions."""
        return cls((curve[:-1] - curve[1:]).clamp_min(0))

    def rank(self, level: float = LEVEL) -> int:
        """The fewest directions that hold `level` of the energy; 0 where there is none."""
        total = self.energy.sum()
        if not total > 0:
            return 0
        # A level is met to rounding: a flat spectrum must not need one direction more.
        return int((self.energy.cumsum(0) < (level - 1e-12) * total).sum()) + 1

    def kept(self, rank: int) -> float:
        """Share of the energy in the first `rank` directions, 0 to 1; 1 where there is none."""
        total = self.energy.sum()
        return min(1.0, float(self.energy[:rank].sum() / total)) if total > 0 else 1.0

    def kept_at(self, ranks: Sequence[int]) -> dict[str, float]:
        """`kept` by rank, as a JSON object."""
        return {str(rank): self.kept(rank) for rank in ranks}

    def effective_rank(self) -> float:
        """exp of the entropy of the singular values (Roy and Vetterli, EUSIPCO 2007); 0 where there is none."""
        values = self.energy.sqrt()
        if not values.sum() > 0:
            return 0.0
        return float(torch.special.entr(values / values.sum()).sum().exp())


def gram_spectrum(*blocks: Tensor) -> Spectrum:
    """Energies of the matrices `[n_i, m]` stacked on top of each other, from the Gram matrix of the smaller side.

    In float64, one block at a time. Against an SVD an energy is off by 2e-14 of the largest one at
    3072 x 1536, so that only singular values below some 1e-7 of the largest are lost: far less than a
    share of the energy shows.
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
    """Energies of the tokens' `[k; v]` `[T, 2I]`, keys normalised and unrotated, about their mean."""
    tokens = torch.cat([sample.key.flatten(1), sample.value.flatten(1)], dim=1).double()
    return gram_spectrum((tokens - tokens.mean(0)) / len(tokens) ** 0.5)


def unrotated_error(sample: LayerSample) -> tuple[Tensor, float]:
    """What each rotary pair loses if its keys are not rotated, float64 `[P]`, and all that the pairs hold.

    The energy of a pair of one head is that of the keys about their mean, a constant that can be rotated
    for nothing, times that of their gradients. What is lost is what the best unrotated stand-in, the key
    times the factor of `mean_rotation`, does not explain.
    """
    key = (sample.key - sample.key.mean(0)).double()
    keys = complex_pairs(key).abs().square().mean(0)
    rotated, fixed = (complex_pairs(x).abs().square().mean(0) for x in (sample.rotated_grad, sample.fixed_grad))
    lost = (rotated - mean_rotation(sample).abs().square() * fixed).clamp_min(0) * keys
    return lost.sum(0), float((rotated * keys).sum())


def rope_pairs(lost: Tensor, axes: Sequence[int]) -> list[dict[str, Any]]:
    """`{pair, axis, share}` of every pair, the share of what all pairs lose unrotated, largest first."""
    shares = lost / lost.sum() if lost.sum() > 0 else torch.zeros_like(lost)
    rows = [
        {"pair": pair, "axis": AXES[axis], "share": share}
        for pair, (axis, share) in enumerate(zip(axes, shares.tolist(), strict=True))
    ]
    return sorted(rows, key=lambda row: -float(row["share"]))


@dataclass
class LayerSpectra:
    """One layer of a dense model; what needs clips is None without them.

    `unrotated` float64 `[P]` is what each rotary pair loses if it is not rotated, `unrotated_share`
    their part in everything that the pairs hold.
    """

    weights: Spectrum
    activations: Spectrum | None = None
    output: Spectrum | None = None
    unrotated: Tensor | None = None
    unrotated_share: float | None = None

    def row(self, ranks: Sequence[int], axes: Sequence[int]) -> dict[str, Any]:
        """The figures that `inspect --json` prints of the layer."""
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
