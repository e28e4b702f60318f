"""Rollouts that begin with given frames: image-to-video and continuation through the cache."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
import torch
from PIL import Image
from recipe_case import write_teacher
from safetensors.torch import load_file, save_file

from mla_convert.cli import main
from mla_convert.errors import UsageError, UserError
from mla_convert.export.checkpoint import load_checkpoint
from mla_convert.flow import denoising_times, next_sample, sampling_times
from mla_convert.run.config import GenerateConfig
from mla_convert.run.sample import rollout
from mla_convert.run.start import read_start
from mla_convert.run.stream import stream_chunks
from mla_convert.run.video import save_video, to_frames

WINDOWS = [
    {"num_frames_per_block": 3, "window_frames": 6, "sink_frames": 1, "independent_first_frame": True},
    {"num_frames_per_block": 2, "window_frames": 4},
    {"num_frames_per_block": 1, "window_frames": 3, "sink_frames": 1},
]
SETTINGS = [{}, {"context_noise": 0.2, "guidance_scale": 2.0, "shift": 3.0}]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "noise-guidance"])
@pytest.mark.parametrize("window", WINDOWS, ids=["first-frame", "chunks", "frames"])
@pytest.mark.parametrize("converted", [False, True])
def test_rollout_goes_on_from_its_own_beginning(
    converted: bool, window: dict[str, Any], settings: dict[str, Any]
) -> None:
    model = pico.dense_model(causal=window)
    if converted:
        model = pico.convert(model, **pico.VARIANTS[6])
    _, _, text = pico.inputs(2, 1, 6, 4)
    steps = {"num_inference_steps": 2, **settings}
    whole = list(stream_chunks(model, text, 9, 6, 4, **steps))
    for given in range(1, len(whole) + 1):
        again = list(stream_chunks(model, text, 9, 6, 4, start=torch.cat(whole[:given], dim=2), **steps))
        assert len(again) == len(whole)
        assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))


def test_one_image_starts_every_item_of_a_batch() -> None:
    model = pico.dense_model(causal=WINDOWS[0])
    image, _, text = pico.inputs(1, 1, 6, 4)[0], None, pico.inputs(3, 1, 6, 4)[2]
    chunks = list(stream_chunks(model, text, 4, 6, 4, num_inference_steps=2, start=image))
    assert torch.equal(chunks[0], image.expand(3, -1, -1, -1, -1))
    assert chunks[1].shape == (3, 2, 3, 6, 4)
    other = list(stream_chunks(model, text, 4, 6, 4, num_inference_steps=2, start=image + 1))
    assert not torch.equal(chunks[1], other[1])


@pytest.mark.parametrize(
    ("window", "shape", "message"),
    [
        (
            WINDOWS[1],
            (1, 2, 1, 6, 4),
            "a start of 1 frames does not end with a chunk; give 2 latent frames, or",
        ),
        (WINDOWS[0], (1, 2, 2, 6, 4), r"give 1 or 4 latent frames, or hold_start \(--hold-start\)"),
        (
            WINDOWS[1],
            (1, 2, 10, 6, 4),
            r"10 frames, more than the 9 of the rollout; raise num_frames \(--frames\)",
        ),
        (WINDOWS[1], (1, 2, 2, 6, 6), "the start has 2 channels of 6x6, the rollout 2 channels of 6x4"),
    ],
)
def test_start_that_does_not_fit_is_refused(window: dict[str, Any], shape: tuple[int, ...], message: str) -> None:
    model = pico.dense_model(causal=window)
    with pytest.raises(UsageError, match=message):
        next(stream_chunks(model, torch.zeros(1, 3, 8), 9, 6, 4, start=torch.zeros(shape)))


@pytest.mark.parametrize(("suffix", "tolerance"), [(".png", 1e-6), (".gif", 1e-6), (".mp4", 0.04)])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_come_back_as_they_were_saved(tmp_path: Path, suffix: str, tolerance: float, channels: int) -> None:
    """The levels are whole bytes: the largest error observed is 1.0e-7 and, in mp4, 0.024."""
    frames = 1 if suffix == ".png" else 3
    levels = torch.linspace(-1, 1, 16).view(1, 1, 1, 16).expand(channels, frames, 16, 16).contiguous()
    levels[:, 1::2] *= -1
    if channels == 3:
        levels[1] = -levels[0]
    video, path = to_frames(levels), tmp_path / f"start{suffix}"
    if suffix == ".png":
        Image.fromarray((video[0] * 255).round().astype(np.uint8)).save(path)
    else:
        save_video(video, path, fps=8)
    found = read_start(path, channels, 16, 16)
    assert found.shape == (channels, frames, 16, 16)
    assert found.dtype == torch.float32
    assert float((found - levels).abs().max()) < tolerance


def test_files_that_hold_no_start_are_refused_in_a_line(tmp_path: Path) -> None:
    picture, text, wrong = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.safetensors"
    Image.new("RGB", (4, 4)).save(picture)
    text.write_text("no picture")
    (tmp_path / "d.mp4").write_text("no video")
    save_file({"frames": torch.zeros(1, 4)}, wrong)
    for path, channels, message in (
        (picture, 16, "the model works on latents; encode the picture"),
        (text, 1, "cannot be read as an image or a video"),
        (tmp_path / "d.mp4", 1, "cannot be read as an image or a video"),
        (wrong, 16, r"holds frames \[1, 4\]; a start must be the tensor latents \[C, F, H, W\]"),
        (tmp_path / "none.png", 1, "does not exist"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read_start(path, channels, 16, 16)
        assert "\n" not in str(caught.value)


def test_generate_takes_a_start(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["generate", str(teacher), "--prompt", "7 moving up-left", "--frames", "9", "--steps", "2"]
    whole, again, start = (tmp_path / f"{name}.safetensors" for name in ("whole", "again", "start"))
    assert main([*asked, "-o", str(whole)]) == 0
    expected = load_file(whole)["latents"]
    save_file({"latents": expected[:, :6].contiguous()}, start)
    assert main([*asked, "-o", str(again), "--start", str(start)]) == 0
    assert torch.equal(load_file(again)["latents"], expected)

    image = tmp_path / "image.png"
    Image.new("L", (64, 64), 255).save(image)
    assert main([*asked, "-o", str(again), "--start", str(image)]) == 2
    assert "a start of 1 frames does not end with a chunk" in capsys.readouterr().err


def test_recipe_can_name_a_start(teacher: Path, tmp_path: Path) -> None:
    save_file({"latents": torch.ones(1, 3, 16, 16)}, tmp_path / "start.safetensors")
    config = GenerateConfig(num_frames=6, num_inference_steps=1, start=str(tmp_path / "start.safetensors"))
    first, second = rollout(load_checkpoint(teacher), torch.zeros(2, 3, 32), config)
    assert torch.equal(first, torch.ones(2, 1, 3, 16, 16))
    assert second.shape == first.shape


@pytest.mark.parametrize(
    "settings", [{}, {"guidance_scale": 2.0}, {"sampler": "renoise", "denoising_steps": [900, 400]}]
)
@pytest.mark.parametrize("converted", [False, True])
def test_a_start_may_be_held_inside_a_chunk(converted: bool, settings: dict[str, Any]) -> None:
    """As in Wan2.2's pipeline, the given frame is restored after every step, and its timestep is 0."""
    model = pico.dense_model(causal=WINDOWS[1] | {"num_frames_per_block": 3, "window_frames": 6})
    if converted:
        model = pico.convert(model, **pico.VARIANTS[6])
    text = pico.inputs(2, 1, 6, 4)[2]
    image = pico.inputs(1, 1, 6, 4, seed=5)[0]
    steps = {"num_inference_steps": 2, "shift": 3.0, **settings}
    first, second = stream_chunks(model, text, 6, 6, 4, start=image, hold_start=True, **steps)
    assert torch.equal(first[:, :, :1], image.expand(2, -1, -1, -1, -1))

    generator, cache = torch.Generator().manual_seed(0), model.init_cache(2, 6, 4)
    x = torch.randn(2, 2, 3, 6, 4, generator=generator)
    times = sampling_times(2, 3.0) if "denoising_steps" not in steps else denoising_times([900, 400], 3.0)
    unguided = model.init_cache(2, 6, 4)
    for t, t_next in itertools.pairwise(times):
        noise = torch.randn(x.shape, generator=generator) if "sampler" in steps and t_next > 0 else None
        x[:, :, :1] = image
        timestep = torch.tensor([0.0, 1000 * t, 1000 * t]).expand(2, 3)
        v = model.forward_chunk(x, timestep, text, cache)
        if "guidance_scale" in steps:
            away = model.forward_chunk(x, timestep, torch.zeros_like(text), unguided)
            v = away + 2 * (v - away)
        x = next_sample(x, v, t, t_next, noise)
    x[:, :, :1] = image
    # Observed: 1.5e-7.
    assert pico.relative_error(first, x) < 1e-5
    # What comes next sees the frame that was given.
    other = list(stream_chunks(model, text, 6, 6, 4, start=-image, hold_start=True, **steps))
    assert not torch.equal(other[1], second)
    with pytest.raises(UsageError, match="a start of 1 frames does not end with a chunk"):
        list(stream_chunks(model, text, 6, 6, 4, start=image, **steps))
