"""Compute low-rank codes of keys and values that are optimal in a given metric.

For a target y with second moment C about its mean and a metric G, the code `c = E (y - mean)` of r numbers and its
decoder D minimize `tr(G (I - D E) C (I - D E)^T)`. With `L L^T = G` and U the top r eigenvectors of `L^T C L`, they are
`E = U^T L^T` and `D = L^-T U` (Eckart-Young in the metric G).
"""

from __future__ import annotations

from typing import NamedTuple

import scipy.linalg
import torch
from torch import Tensor

RIDGE = 1e-6
"""The share of a metric's mean eigenvalue that is added to it, so that it can be inverted."""

# Share of the largest eigenvalue below which float64 rounding of a Gram matrix hides a direction.
LOST = 1e-12
ROWS_AT_ONCE = 512


class Code(NamedTuple):
    """`encoder` `[r, n]`, `decoder` `[n, r]`, `mean` `[n]`, float64.

    `energy` `[r]` are the eigenvalues that the code keeps, falling; `total` is the sum of all eigenvalues.
    """

    encoder: Tensor
    decoder: Tensor
    mean: Tensor
    energy: Tensor
    total: float

    def cpu(self) -> Code:
        """Copy the code to the CPU."""
        return Code(self.encoder.cpu(), self.decoder.cpu(), self.mean.cpu(), self.energy.cpu(), self.total)


def _leading(matrix: Tensor, count: int, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """The `count` largest eigenvalues `[count]`, falling, and eigenvectors `[n, count]` of a symmetric matrix.

    With `overwrite`, only the upper triangle is read, and LAPACK uses the matrix itself as workspace, not a copy.
    """
    size = len(matrix)
    if matrix.device.type != "cpu":
        values, vectors = torch.linalg.eigh(matrix, UPLO="U")
        return values[-count:].flip(0), vectors[:, -count:].flip(1)
    # LAPACK's subset driver took 2.9 s for 224 of 3072, all of them 7.7 s (one core).
    # LAPACK expects column-major order; for a symmetric matrix, the transpose provides it without a copy.
    array = matrix.T.numpy() if overwrite else matrix.numpy()
    found, columns = scipy.linalg.eigh(
        array, subset_by_index=[size - count, size - 1], driver="evr", overwrite_a=overwrite, check_finite=not overwrite
    )
    return torch.from_numpy(found.copy()).flip(0), torch.from_numpy(columns).flip(1)


def symmetric_root(g: Tensor) -> tuple[Tensor, Tensor]:
    """`G^(1/2)` and its inverse for a positive semi-definite G, with a ridge that keeps it invertible."""
    ridge = _ridge(g)
    if ridge == 0:
        eye = torch.eye(len(g), dtype=g.dtype)
        return eye, eye
    values, vectors = torch.linalg.eigh(_with_ridge(g, ridge))
    root = values.clamp_min(0.5 * ridge).sqrt()
    return (vectors * root) @ vectors.mH, (vectors / root) @ vectors.mH


def low_rank_code(covariance: Tensor, metric: Tensor, mean: Tensor, rank: int, ridge: float = RIDGE) -> Code:
    """The best code of `rank` numbers for a target with this covariance, in this metric.

    `ridge` times the mean eigenvalue of the metric is added to the metric. Latents are scaled to unit variance under
    the covariance, which suits low-precision dtypes and training. Raises ValueError if `rank` exceeds the size of the
    target.
    """
    _check_rank(rank, len(covariance))
    added = _ridge(metric, ridge)
    # Any L with L L^T = G will do; a triangular one costs a tenth of the symmetric one.
    root = torch.linalg.cholesky(_with_ridge(metric, added)) if added > 0 else torch.eye(len(metric)).to(metric)
    whitened = root.T @ covariance @ root
    energy, basis = _leading(whitened, rank)
    spread = _spread(energy)
    decoder = torch.linalg.solve_triangular(root.T, basis * spread, upper=True)
    return Code((basis / spread).T @ root.T, decoder, mean, energy, float(torch.trace(whitened)))


def low_rank_code_of_samples(samples: Tensor, probes: Tensor, mean: Tensor, rank: int, ridge: float = RIDGE) -> Code:
    """The `low_rank_code` for the covariance `samples^T samples` and the metric `probes^T probes`.

    For X = `samples` `[m, n]` and P = `probes` `[k, n]` with m and k below n, it needs no n x n matrix and no root of
    the metric G = P^T P + its ridge. With U, E the leading eigenpairs of `X G X^T`, the columns of `X^T U E^-1/2` are
    orthonormal in G. They are the decoder D up to the scale s of the latents; the encoder is `s^-2 D^T G`.
    Raises ValueError if `rank` exceeds m.
    """
    _check_rank(rank, len(samples))
    added = max(0.0, ridge * float(probes.square().sum()) / probes.shape[1])
    if added == 0:
        return low_rank_factor(samples, mean, rank)

    def times_metric(x: Tensor) -> Tensor:
        return (added * x).addmm_(probes.T, probes @ x)

    cross = samples @ probes.T
    kernel = _upper_gram(samples).mul_(added).add_(_upper_gram(cross))
    del cross
    total = float(kernel.trace())
    energy, vectors = _leading(kernel, rank, overwrite=True)
    # Rounding hides the remaining directions, so any will do.
    carried = int((energy > LOST * energy[0]).sum())
    basis = samples.T @ (vectors[:, :carried] / energy[:carried].sqrt())
    basis, seen = _orthonormal(basis, times_metric(basis))
    if carried < rank:
        generator = torch.Generator().manual_seed(0)
        others = torch.randn(len(basis), rank - carried, generator=generator, dtype=basis.dtype).to(basis.device)
        for _ in range(2):
            others -= basis @ (seen.T @ others)
        filled = _orthonormal(others, times_metric(others))
        basis, seen = (torch.cat(parts, dim=1) for parts in zip((basis, seen), filled, strict=True))
    spread = _spread(energy)
    return Code((seen / spread).T, basis * spread, mean, energy, total)


def _orthonormal(x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormalize the columns of `x` `[n, r]` in a metric, in their order; `seen` is the metric times `x`.

    Returns the new `x` and `seen`.
    """
    for _ in range(2):
        root = torch.linalg.cholesky(x.T @ seen)
        x, seen = (torch.linalg.solve_triangular(root, part.T, upper=False).T for part in (x, seen))
    return x, seen


def _upper_gram(x: Tensor) -> Tensor:
    """Compute the upper triangle of `x x^T` at little more than half the cost; entries below it are zero or correct."""
    gram = x.new_zeros(len(x), len(x))
    for start in range(0, len(x), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        torch.mm(x[rows], x[start:].T, out=gram[rows, start:])
    return gram


def low_rank_factor(factor: Tensor, mean: Tensor, rank: int) -> Code:
    """The `low_rank_code` for the covariance `factor^T factor`, `factor` `[m, n]`, in the identity metric.

    The eigenvectors are those of the smaller of the two Gram matrices. Raises ValueError if `rank` exceeds n.
    """
    _check_rank(rank, factor.shape[1])
    if rank > len(factor):
        return low_rank_code(factor.T @ factor, factor.new_zeros(factor.shape[1], factor.shape[1]), mean, rank)
    gram = factor @ factor.T
    energy, vectors = _leading(gram, rank)
    spread = _spread(energy)
    # QR keeps the basis orthonormal where eigenvalues are zero.
    basis = torch.linalg.qr(factor.T @ vectors).Q
    return Code((basis / spread).T, basis * spread, mean, energy, float(torch.trace(gram)))


def _check_rank(rank: int, size: int) -> None:
    if rank > size:
        raise ValueError(f"kv_lora_rank {rank} is larger than the {size} numbers it encodes")


def _ridge(g: Tensor, share: float = RIDGE) -> float:
    return max(0.0, share * float(torch.trace(g).real) / len(g))


def _with_ridge(g: Tensor, added: float) -> Tensor:
    """A copy of G with `added` on its diagonal; no identity matrix is built, because G may be large."""
    ridged = g.clone()
    ridged.diagonal().add_(added)
    return ridged


def _spread(energy: Tensor) -> Tensor:
    """The standard deviation of each latent, at least a small positive number."""
    return energy.clamp_min(float(energy[0].clamp_min(1e-30)) * 1e-8).sqrt()
