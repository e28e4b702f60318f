"""Low-rank codes of keys and values, optimal in a given metric.

For a target y with second moment C about its mean and a metric G, the code `c = E (y - mean)` of r
numbers and its decoder D minimise `tr(G (I - D E) C (I - D E)^T)`: with `L L^T = G` and U the top
r eigenvectors of `L^T C L`, `E = U^T L^T` and `D = L^-T U` (Eckart-Young in the metric G).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RIDGE = 1e-6


class Code(NamedTuple):
    """`encoder` `[r, n]`, `decoder` `[n, r]`, `mean` `[n]`, float64; `energy` `[n]` the eigenvalues, falling."""

    encoder: Tensor
    decoder: Tensor
    mean: Tensor
    energy: Tensor

    def error(self) -> float:
        """Share of the metric's energy that the code loses, 0 to 1."""
        total = self.energy.clamp_min(0).sum()
        return float(self.energy[len(self.encoder) :].clamp_min(0).sum() / total) if total > 0 else 0.0


def symmetric_root(g: Tensor) -> tuple[Tensor, Tensor]:
    """`G^(1/2)` and its inverse for a positive semi-definite G, with a ridge that keeps it invertible."""
    ridge = _ridge(g)
    eye = torch.eye(len(g), dtype=g.dtype)
    if ridge == 0:
        return eye, eye
    values, vectors = torch.linalg.eigh(g + ridge * eye)
    root = values.clamp_min(0.5 * ridge).sqrt()
    return (vectors * root) @ vectors.mH, (vectors / root) @ vectors.mH


def low_rank_code(covariance: Tensor, metric: Tensor, mean: Tensor, rank: int) -> Code:
    """The best code of `rank` numbers for a target with this covariance under this metric.

    Latents are scaled to unit variance under the covariance, so that their dtype and their training
    are well conditioned. Raises ValueError if `rank` exceeds the size of the target.
    """
    _check_rank(rank, len(covariance))
    eye = torch.eye(len(metric), dtype=metric.dtype)
    ridge = _ridge(metric)
    # Any L with L L^T = G serves; a triangular one costs a tenth of the symmetric one.
    root = torch.linalg.cholesky(metric + ridge * eye) if ridge > 0 else eye
    values, vectors = torch.linalg.eigh(root.T @ covariance @ root)
    energy, basis = values.flip(0), vectors.flip(1)[:, :rank]
    spread = _spread(energy[:rank])
    decoder = torch.linalg.solve_triangular(root.T, basis * spread, upper=True)
    return Code((basis / spread).T @ root.T, decoder, mean, energy)


def low_rank_factor(factor: Tensor, mean: Tensor, rank: int) -> Code:
    """`low_rank_code` for the covariance `factor^T factor`, `factor` `[m, n]`, in the plain metric.

    The eigenvectors are taken of the smaller of the two Gram matrices. Raises ValueError if `rank`
    exceeds n.
    """
    _check_rank(rank, factor.shape[1])
    if rank > len(factor):
        return low_rank_code(factor.T @ factor, torch.zeros(factor.shape[1], factor.shape[1]).double(), mean, rank)
    values, vectors = torch.linalg.eigh(factor @ factor.T)
    energy = values.flip(0).clamp_min(0)
    spread = _spread(energy[:rank])
    # Orthonormal also where the spectrum has ended.
    basis = torch.linalg.qr(factor.T @ vectors.flip(1)[:, :rank]).Q
    return Code((basis / spread).T, basis * spread, mean, energy)


def _check_rank(rank: int, size: int) -> None:
    if rank > size:
        raise ValueError(f"kv_lora_rank {rank} is larger than the {size} numbers it encodes")


def _ridge(g: Tensor) -> float:
    return max(0.0, RIDGE * float(torch.trace(g).real) / len(g))


def _spread(energy: Tensor) -> Tensor:
    """Standard deviation of each latent, kept off zero where the data has none."""
    return energy.clamp_min(float(energy[0].clamp_min(1e-30)) * 1e-8).sqrt()
