"""Digits-Bench on constructed videos whose values are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mla_convert.evaluate import video_metrics as vm
from mla_convert.zoo.digits.data import DIRECTIONS, Prompt, digit_images, parse_prompt, render

FRAMES = 12


def videos_of(prompts: list[Prompt], frames: int = FRAMES, index: int = 0) -> torch.Tensor:
    """Perfect videos of prompts with real held-out digits."""
    images, classes = digit_images("heldout")
    chosen = [images[(classes == prompt.digit).nonzero()[index, 0]] for prompt in prompts]
    return torch.stack([render(image, prompt.path(frames)) for image, prompt in zip(chosen, prompts, strict=True)])


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return [Prompt(digit, digit % 3, digit // 4, direction) for digit in range(10) for direction in DIRECTIONS]


@pytest.fixture(scope="module")
def perfect(prompts):
    return vm.frame_metrics(videos_of(prompts), prompts)


def test_real_digits_on_their_paths(perfect) -> None:
    assert perfect["digit_accuracy"].mean() > 0.95
    assert perfect["motion_accuracy"].mean() == 1
    assert np.nanmean(perfect["bounce_accuracy"]) == 1
    # Observed 0.948: features of the same digit at nine places.
    assert np.nanmean(perfect["subject_consistency"]) > 0.9
    # Straight paths of whole cells: no acceleration between bounces; observed 2e-7 pixels.
    assert np.nanmax(perfect["motion_smoothness"]) < 1e-5


def test_speed_is_that_of_the_path() -> None:
    prompts = [parse_prompt("3 at 0,0 moving down"), parse_prompt("3 at 0,0 moving down-right")]
    speed = vm.frame_metrics(videos_of(prompts), prompts)["dynamic_degree"]
    assert np.isnan(speed[:, 0]).all()
    np.testing.assert_allclose(speed[0, 1:], 4, atol=1e-5)
    np.testing.assert_allclose(speed[1, 1:], 4 * np.sqrt(2), atol=1e-5)


def test_a_still_picture_moves_nowhere_and_never_flickers() -> None:
    prompt = parse_prompt("5 at 1,1 moving up")
    still = videos_of([prompt])[:, :, :1].expand(-1, -1, FRAMES, -1, -1)
    found = vm.frame_metrics(still, [prompt])
    assert np.nanmax(found["dynamic_degree"]) == 0
    assert np.nanmin(found["temporal_flickering"]) == 1
    np.testing.assert_allclose(found["subject_consistency"][:, 1:], 1)
    # The path visits the cell of the first frame every other frame.
    assert found["motion_accuracy"].mean() == 0.5


def test_flicker_is_the_mean_change_of_pixels() -> None:
    prompt = parse_prompt("5")
    dark = torch.full((1, 1, 4, 16, 16), -1.0)
    dark[:, :, 1::2] = 1.0
    assert np.nanmax(vm.frame_metrics(dark, [prompt])["temporal_flickering"]) == 0
    dark[:, :, 1::2] = -1 + 2 * 51 / 255
    np.testing.assert_allclose(vm.frame_metrics(dark, [prompt])["temporal_flickering"][:, 1:], 0.8, atol=1e-6)


def test_the_wrong_digit_and_the_wrong_way(prompts) -> None:
    videos = videos_of(prompts)
    other = [Prompt((p.digit + 1) % 10, p.row, p.column, p.direction) for p in prompts]
    assert vm.frame_metrics(videos, other)["digit_accuracy"].mean() < 0.05
    right, wrong = (parse_prompt(f"4 at 1,1 moving {direction}") for direction in ("up-left", "down-right"))
    # Both are in the middle at every other frame, and in opposite corners between.
    assert vm.frame_metrics(videos_of([right]), [wrong])["motion_accuracy"].mean() == 0.5


def test_bounces_are_the_frames_after_a_turn() -> None:
    path = parse_prompt("1 at 0,0 moving right").path(8)[None]
    assert path[0, :, 1].tolist() == [0, 4, 8, 4, 0, 4, 8, 4]
    assert vm.turning_points(path)[0].tolist() == [False, False, False, True, False, True, False, True]


def test_sharpness_of_a_checkerboard() -> None:
    board = (torch.arange(16).view(-1, 1) + torch.arange(16)) % 2
    # Every Laplacian of 0 and 1 in turn is 4 or -4, whose variance is 16.
    assert vm.sharpness(board.float().view(1, 1, 16, 16))[0, 0] == 16
    assert vm.sharpness(torch.full((1, 1, 16, 16), 0.5))[0, 0] == 0


def test_frechet_distance_of_known_normals() -> None:
    generator = np.random.default_rng(0)
    one = generator.normal(size=(20000, 3))
    two = 2 * generator.normal(size=(20000, 3)) + np.array([1.0, 0.0, 0.0])
    # |m|^2 + tr(1 + 4 - 2 * 2) a channel = 1 + 3; observed 4.03.
    assert vm.frechet_distance(one, two) == pytest.approx(4, abs=0.1)
    assert vm.frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    # Two halves of one set: what sampling alone gives; observed 3e-4.
    assert vm.frechet_distance(one[:10000], one[10000:]) < 0.01


def test_drift_and_interval() -> None:
    falling = np.tile(np.linspace(1, 0, 8), (6, 1))
    np.testing.assert_allclose(vm.drift(falling), falling[0, -2:].mean() - falling[0, :2].mean())
    values = np.array([0.0, 1.0] * 50)
    found = vm.estimate(values)
    # The binomial interval of 100 videos at a half is 0.40 to 0.60.
    assert found.mean == 0.5 and 0.37 < found.low < 0.43 and 0.57 < found.high < 0.63
    assert vm.estimate(values) == found
    assert vm.estimate(np.ones((4, 3))) == vm.Estimate(1, 1, 1)
