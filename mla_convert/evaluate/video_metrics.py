"""Computes the metrics of Digits-Bench, per frame or per video, for generated digit videos.

Videos are float32 `[N, 1, F, 16, 16]` in [-1, 1]; the prompts define what they should show. Metrics with VBench's
definition (arXiv 2311.17982) have VBench's name. `docs/digits-bench.md` has all formulas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.stats import bootstrap
from torch import Tensor

from ..zoo.digits.classifier import classify, load_classifier
from ..zoo.digits.data import CELLS, DIGIT, FRAME, STEP, Prompt

Array = NDArray[np.float64]

HIGHER = ("digit_accuracy", "motion_accuracy", "bounce_accuracy", "subject_consistency", "temporal_flickering")
"""Metrics for which higher is better; the others are compared with real videos."""


@dataclass(frozen=True)
class Estimate:
    """A mean over videos with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def frame_metrics(videos: Tensor, prompts: Sequence[Prompt]) -> dict[str, Array]:
    """The metrics by frame, `[N, F]`, NaN where a frame has no value.

    - `digit_accuracy`: 1 where the classifier sees the prompted class.
    - `motion_accuracy`: 1 where the brightest of the nine cells is on the prompt's path, bounces included.
    - `bounce_accuracy`: the same, only on the first frame after a change of direction.
    - `subject_consistency`: mean cosine of a frame's features with those of the first and of the previous frame
      (VBench, section 4.1).
    - `temporal_flickering`: `1 - mean |x_t - x_(t-1)| / 255` in 8-bit pixels (VBench).
    - `motion_smoothness`: acceleration of the center of brightness in pixels per frame squared, where the prompt's
      path is straight.
    - `dynamic_degree`: speed of that center in pixels per frame.
    - `sharpness`: variance of the Laplacian of pixels in [0, 1].
    """
    frames = videos[:, 0].float()
    classes = torch.tensor([prompt.digit for prompt in prompts])
    paths = np.stack([prompt.path(frames.shape[1]) for prompt in prompts])
    right = (located(frames) == paths // STEP).all(-1).astype(np.float64)
    bounces = turning_points(paths)
    center = centers(frames)
    speed = np.linalg.norm(np.diff(center, axis=1), axis=-1)
    acceleration = np.linalg.norm(np.diff(center, n=2, axis=1), axis=-1)
    pixels = (frames.clamp(-1, 1) + 1) / 2
    change = (pixels[:, 1:] - pixels[:, :-1]).abs().mean((2, 3)).numpy()
    return {
        "digit_accuracy": (classify(videos.float()) == classes.unsqueeze(1)).double().numpy(),
        "motion_accuracy": right,
        "bounce_accuracy": np.where(bounces, right, np.nan),
        "subject_consistency": _pad_first(consistency(features(frames)), 1),
        "temporal_flickering": _pad_first(1 - change.astype(np.float64), 1),
        "motion_smoothness": np.where(bounces, np.nan, _pad_first(acceleration, 2)),
        "dynamic_degree": _pad_first(speed, 1),
        "sharpness": sharpness(pixels),
    }


def located(frames: Tensor) -> NDArray[np.int64]:
    """The brightest cell (row, column) `[N, F, 2]` of each frame of `[N, F, 16, 16]`."""
    light = (frames.clamp(-1, 1) + 1).flatten(0, 1).unsqueeze(1)
    sums = F.avg_pool2d(light, DIGIT, STEP).flatten(1).argmax(-1)
    cells = torch.stack([sums // CELLS, sums % CELLS], dim=-1)
    return cells.view(*frames.shape[:2], 2).numpy()


def centers(frames: Tensor) -> Array:
    """The center of brightness (y, x) in pixels, `[N, F, 2]`; for a dark frame, the center of the frame."""
    light = (frames.clamp(-1, 1) + 1).double() + 1e-9
    places = torch.arange(FRAME, dtype=torch.float64)
    total = light.sum((2, 3))
    y = (light.sum(3) * places).sum(2) / total
    x = (light.sum(2) * places).sum(2) / total
    return torch.stack([y, x], dim=-1).numpy()


def turning_points(paths: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which frames `[N, F]` are the first after a change of direction of paths `[N, F, 2]`."""
    steps = np.diff(paths, axis=1)
    turned = (steps[:, 1:] != steps[:, :-1]).any(-1)
    return np.pad(turned, ((0, 0), (2, 0)))


def features(frames: Tensor) -> Tensor:
    """The classifier features `[N, F, 64]` of frames `[N, F, 16, 16]`."""
    with torch.inference_mode():
        return load_classifier().features(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])


def consistency(found: Tensor) -> Array:
    """`(cos(f_1, f_t) + cos(f_(t-1), f_t)) / 2` for t = 2 ... F, `[N, F - 1]`, of features `[N, F, 64]`."""
    unit = F.normalize(found.double(), dim=-1)
    with_first = (unit[:, 1:] * unit[:, :1]).sum(-1)
    with_last = (unit[:, 1:] * unit[:, :-1]).sum(-1)
    return ((with_first + with_last) / 2).numpy()


def sharpness(pixels: Tensor) -> Array:
    """Each frame's variance of the Laplacian, `[N, F]`, for pixels `[N, F, 16, 16]` in [0, 1]."""
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]).view(1, 1, 3, 3)
    edges = F.conv2d(pixels.flatten(0, 1).unsqueeze(1), kernel)
    return edges.flatten(1).double().var(1, correction=0).view(pixels.shape[:2]).numpy()


def frechet_distance(first: Array, second: Array) -> float:
    """The squared Fréchet distance between normal distributions fitted to features `[N, C]` and `[M, C]`.

    `|m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))` (arXiv 1706.08500); NaN for features that are not finite.
    """
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return math.nan
    means = first.mean(0) - second.mean(0)
    one, two = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # tr (S_1 S_2)^(1/2) = tr (S_1^(1/2) S_2 S_1^(1/2))^(1/2), which is symmetric.
    product = np.sqrt(np.linalg.eigvalsh(root @ two @ root).clip(0)).sum()
    return float(means @ means + np.trace(one) + np.trace(two) - 2 * product)


def drift(values: Array, share: float = 0.25) -> Array:
    """By video, `[N]`, the mean over the last `share` of the frames minus that over the first, of `[N, F]`."""
    part = max(1, round(share * values.shape[1]))
    return np.asarray(_mean(values[:, -part:]) - _mean(values[:, :part]))


def estimate(values: Array, seed: int = 0) -> Estimate:
    """The mean over videos of `[N]` or `[N, F]`, with the 95 % percentile interval of 1,000 resampled sets."""
    videos = _mean(values) if values.ndim == 2 else values
    videos = videos[~np.isnan(videos)]
    if len(videos) == 0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    mean = float(videos.mean())
    if len(videos) < 2 or np.ptp(videos) == 0:
        return Estimate(mean, mean, mean)
    found = bootstrap((videos,), np.mean, n_resamples=1000, method="percentile", rng=np.random.default_rng(seed))
    return Estimate(mean, float(found.confidence_interval.low), float(found.confidence_interval.high))


def _mean(values: Array) -> Array:
    """The mean over frames that have a value; NaN for a video without one."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, values, 0).sum(1) / known.sum(1))


def _pad_first(values: Array, frames: int) -> Array:
    """Prepend NaN for the first `frames` frames, which have no value."""
    return np.pad(values, ((0, 0), (frames, 0)), constant_values=np.nan)
