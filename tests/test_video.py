from __future__ import annotations

from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from mla_convert.errors import UsageError, UserError
from mla_convert.run.video import check_suffix, save_video, scale_factor, side_by_side, to_frames


def moving_square(frames: int = 6, height: int = 16, width: int = 16) -> np.ndarray:
    video = np.zeros((frames, height, width, 3), dtype=np.float32)
    for i in range(frames):
        video[i, 4:8, i : i + 4] = 1.0
    return video


def decode(path: Path) -> tuple[dict, np.ndarray]:
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    return meta, np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def test_to_frames_maps_pixels_to_rgb() -> None:
    video = torch.linspace(-1.5, 1.5, 7).view(1, 7, 1, 1).expand(1, 7, 4, 5)
    frames = to_frames(video)
    assert frames.shape == (7, 4, 5, 3) and frames.dtype == np.float32
    np.testing.assert_allclose(frames[:, 0, 0, 0], [0, 0, 0.25, 0.5, 0.75, 1, 1], atol=1e-6)
    assert to_frames(torch.zeros(3, 2, 4, 4)).shape == (2, 4, 4, 3)


def test_to_frames_refuses_what_is_no_picture() -> None:
    with pytest.raises(UsageError, match=r"16 channels.*VAE"):
        to_frames(torch.zeros(16, 3, 4, 4))
    with pytest.raises(UserError, match="NaN"):
        to_frames(torch.full((1, 2, 4, 4), float("nan")))


@pytest.mark.parametrize(
    ("height", "width", "factor"),
    [(16, 16, 16), (8, 8, 32), (30, 52, 16), (480, 832, 1), (256, 256, 1), (17, 16, 16), (100, 100, 4), (300, 301, 1)],
)
def test_scale_factor(height: int, width: int, factor: int) -> None:
    assert scale_factor(height, width) == factor


def test_mp4_is_playable_visible_and_the_same_every_time(tmp_path: Path) -> None:
    video = moving_square()
    save_video(video, tmp_path / "a.mp4", fps=8)
    save_video(iter([video[:2], video[2:]]), tmp_path / "b.mp4", fps=8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    meta, decoded = decode(tmp_path / "a.mp4")
    assert meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p")
    assert meta["size"] == (256, 256) and meta["fps"] == 8 and len(decoded) == 6
    error = np.abs(decoded[:, 8::16, 8::16].astype(float) / 255 - video)
    assert error.max() < 0.05, error.max()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def test_mp4_keeps_color_and_takes_odd_sizes(tmp_path: Path) -> None:
    video = np.broadcast_to(np.float32([0.8, 0.3, 0.1]), (3, 301, 257, 3))
    save_video(video, tmp_path / "odd.mp4", fps=16)
    meta, decoded = decode(tmp_path / "odd.mp4")
    assert meta["size"] == (258, 302)
    assert np.abs(decoded.mean((0, 1, 2)) / 255 - [0.8, 0.3, 0.1]).max() < 0.02


def test_gif_loops_and_keeps_its_speed(tmp_path: Path) -> None:
    save_video(moving_square(), tmp_path / "a.gif", fps=10)
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.n_frames == 6 and picture.size == (256, 256)
        assert picture.info["loop"] == 0 and picture.info["duration"] == 100


def test_a_name_without_suffix_is_a_folder_of_png_files(tmp_path: Path) -> None:
    for _ in range(2):
        save_video(moving_square(), tmp_path / "frames", fps=8)
    files = sorted((tmp_path / "frames").iterdir())
    assert [f.name for f in files] == [f"frame_{i:05d}.png" for i in range(6)]
    with Image.open(files[3]) as picture:
        assert picture.size == (256, 256) and picture.getpixel((5 * 16, 5 * 16)) == (255, 255, 255)


def test_wrong_targets_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"use \.mp4, \.gif"):
        save_video(moving_square(), tmp_path / "a.avi", fps=8)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="contains other files than video frames"):
        check_suffix(tmp_path / "mine")
    with pytest.raises(UserError, match="no frames"):
        save_video(iter([]), tmp_path / "a.mp4", fps=8)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_full_disk_is_one_clear_line(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mla_convert.files._create", lambda path: path.symlink_to("/dev/full"))
    with pytest.raises(UserError, match="the disk is full"):
        save_video(moving_square(), tmp_path / name, fps=8)
    assert list(tmp_path.iterdir()) == []


def test_a_rollout_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def chunks():
        yield moving_square()
        raise UserError("the model diverged")

    for name in ("a.mp4", "a.gif", "frames"):
        with pytest.raises(UserError, match="diverged"):
            save_video(chunks(), tmp_path / name, fps=8)
    assert list(tmp_path.iterdir()) == []


def test_side_by_side() -> None:
    teacher, student = moving_square(), moving_square() * 0.5
    both = side_by_side(teacher, student)
    assert both.shape == (6, 280, 520, 3)
    np.testing.assert_array_equal(both[0, 24 : 24 + 256 : 16, :256:16], teacher[0])
    np.testing.assert_array_equal(both[0, 24 : 24 + 256 : 16, 264 : 264 + 256 : 16], student[0])
    assert both[0, :24].max() > 0.5, "the label is drawn"

    stack = side_by_side(np.stack([teacher] * 3), np.stack([student] * 3), labels=None)
    assert stack.shape == (6, 264, 400, 3)
    np.testing.assert_array_equal(stack[5, 136 : 136 + 128 : 8, 272 : 272 + 128 : 8], student[5])
    with pytest.raises(ValueError, match="cannot compare"):
        side_by_side(teacher, student[:3])
