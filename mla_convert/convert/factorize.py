"""Low-rank codes of keys and values, optimal in a given metric.

For a target y with second moment C about its mean and a metric G, the code `c = E (y - mean)` of r
numbers and its decoder D minimise `tr(G (I - D E) C (I - D E)^T)`: with `L = G^(1/2)` and U the top
r eigenvectors of `L C L`, `E = U^T L` and `D = L^-1 U` (Eckart-Young in the metric G).
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


def second_moment(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `[n]` and second moment about it `[n, n]` of samples `[T, n]`, float64."""
    x = x.double()
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.T @ centred / len(x)


def symmetric_root(g: Tensor) -> tuple[Tensor, Tensor]:
    """`G^(1/2)` and its inverse for a positive semi-definite G, with a ridge that keeps it invertible."""
    ridge = RIDGE * torch.trace(g) / len(g)
    if not ridge > 0:
        return torch.eye(len(g), dtype=g.dtype), torch.eye(len(g), dtype=g.dtype)
    values, vectors = torch.linalg.eigh(g + ridge * torch.eye(len(g), dtype=g.dtype))
    root = values.clamp_min(0.5 * float(ridge)).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def low_rank_code(covariance: Tensor, metric: Tensor, mean: Tensor, rank: int) -> Code:
    """The best code of `rank` numbers for a target with this covariance under this metric.

    Latents are scaled to unit variance under the covariance, so that their dtype and their training
    are well conditioned. Raises ValueError if `rank` exceeds the size of the target.
    """
    size = len(covariance)
    if rank > size:
        raise ValueError(f"kv_lora_rank {rank} is larger than the {size} numbers it encodes")
    root, inverse = symmetric_root(metric)
    values, vectors = torch.linalg.eigh(root @ covariance @ root)
    energy, basis = values.flip(0), vectors.flip(1)[:, :rank]
    spread = energy[:rank].clamp_min(float(energy[0].clamp_min(1e-30)) * 1e-8).sqrt()
    return Code((basis / spread).T @ root, inverse @ (basis * spread), mean, energy)
