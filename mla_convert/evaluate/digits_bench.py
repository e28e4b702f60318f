"""Runs Digits-Bench: rollouts of teacher and student at several lengths, compared with real videos."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..mla.model import StreamingModel
from ..zoo.digits.data import CLIP_FRAMES, Prompt, all_prompts, digit_images, render
from .config import EvaluateConfig
from .rollouts import chosen_prompts, digit_rollouts
from .video_metrics import HIGHER, Array, drift, estimate, features, frame_metrics, frechet_distance

FRECHET = "frechet_distance"
FEATURE_FRAMES = 3
"""Every third frame counts in the Fréchet distance; a path has a period of four, so all of its cells occur."""
REFERENCE_DRAWS = 4
"""Real videos per held-out prompt in the reference set of the Fréchet distance."""


def factors(config: EvaluateConfig) -> list[int]:
    """The rollout lengths as multiples of the training length, ascending from 1."""
    return sorted({1, *config.factors, *([config.long_factor] if config.long_factor else [])})


def digits_bench(
    models: Mapping[str, StreamingModel], config: EvaluateConfig, report: Callable[[str, int, int], None]
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """The metrics of the models and of real videos, and the accuracy at the last frame by model and length.

    `lengths` has, by length (`1x`, `8x`, ...), source and metric, the `mean` over videos and the `low` and `high` end
    of its 95 % interval; `drift` has the same for the end minus the beginning. The Fréchet distance is measured to a
    larger set of real videos; its value for the real source shows the effect of the sample size alone.
    """
    count, lengths = config.rollout_prompts, factors(config)
    prompts = chosen_prompts(count) * config.rollout_seeds
    frames = lengths[-1] * CLIP_FRAMES
    videos = {"real": real_videos(prompts, frames, config.seed)}
    for name, model in models.items():
        drawn = []
        # The teacher always takes evenly spaced Euler steps.
        own = {} if name == "student" else {"sampler": "euler", "denoising_steps": None, "first_chunk_steps": None}
        for seed in range(config.rollout_seeds):
            changed = config.model_copy(update={"seed": config.seed + seed, **own})

            def progress(done: int, total: int, name: str = name, before: int = seed * frames) -> None:
                report(f"rollouts of the {name}", before + done, config.rollout_seeds * total)

            drawn.append(digit_rollouts(model, frames, changed, progress)[0])
        videos[name] = torch.cat(drawn)
    by_length = {f"{factor}x": _measured(videos, prompts, factor * CLIP_FRAMES, config.seed) for factor in lengths}
    by_frame = {name: frame_metrics(video, prompts)["digit_accuracy"] for name, video in videos.items()}
    accuracy = {
        name: {f"{factor}x": float(by_frame[name][:, factor * CLIP_FRAMES - 1].mean()) for factor in lengths}
        for name in models
    }
    return {
        "prompts": count,
        "seeds": config.rollout_seeds,
        "clip_frames": CLIP_FRAMES,
        "lengths": by_length,
        "digit_accuracy_by_frame": {name: found.mean(0).round(6).tolist() for name, found in by_frame.items()},
    }, accuracy


def real_videos(prompts: Sequence[Prompt], num_frames: int, seed: int) -> Tensor:
    """Render held-out digits on the paths of the prompts, `[N, 1, F, 16, 16]`."""
    images, classes = digit_images("heldout")
    generator = np.random.default_rng(seed)
    videos = []
    for prompt in prompts:
        members = (classes == prompt.digit).nonzero()[:, 0]
        videos.append(render(images[members[generator.integers(len(members))]], prompt.path(num_frames)))
    return torch.stack(videos)


def _measured(videos: Mapping[str, Tensor], prompts: Sequence[Prompt], frames: int, seed: int) -> dict[str, Any]:
    """The metrics of the first `frames` frames of every source."""
    found: dict[str, Any] = {}
    reference = _feature_set(real_videos([*all_prompts("heldout")] * REFERENCE_DRAWS, frames, seed + 1))
    for name, video in videos.items():
        values = frame_metrics(video[:, :, :frames], prompts)
        metrics: dict[str, Any] = {
            metric: _finite(dataclasses.asdict(estimate(of_frames, seed))) for metric, of_frames in values.items()
        }
        distance = frechet_distance(reference, _feature_set(video[:, :, :frames]))
        metrics[FRECHET] = {"mean": distance, "low": None, "high": None}
        metrics["drift"] = {
            metric: _finite(dataclasses.asdict(estimate(drift(values[metric]), seed)))
            for metric in (*HIGHER, "sharpness", "dynamic_degree")
            if metric != "bounce_accuracy"
        }
        found[name] = metrics
    return found


def _feature_set(videos: Tensor) -> Array:
    return features(videos[:, 0, ::FEATURE_FRAMES].float()).flatten(0, 1).double().numpy()


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    """Replace NaN, the value of a metric that no frame has, by None."""
    return {name: None if math.isnan(value) else value for name, value in values.items()}
