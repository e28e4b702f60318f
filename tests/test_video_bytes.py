"""A video file has the same bytes whether its frames were rounded on the device or by the writer."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mla_convert.errors import UsageError, UserError
from mla_convert.run import video
from mla_convert.run.decode import frame_chunks
from mla_convert.run.video import save_video, to_bytes, to_frames


def pixels(dtype: torch.dtype, channels: int, height: int, width: int) -> torch.Tensor:
    """All values around the middle between two bytes, and some out of range; `[C, F, H, W]`."""
    halves = (torch.arange(-2, 258).double() + 0.5) / 255 * 2 - 1
    near = torch.cat(
        [halves, halves.float().nextafter(torch.tensor(9.0)), halves.float().nextafter(torch.tensor(-9.0))]
    )
    count = channels * 4 * height * width
    return near.repeat(count // len(near) + 1)[:count].view(channels, 4, height, width).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "size"), [(1, (16, 16)), (3, (300, 257))])
@pytest.mark.parametrize("suffix", [".mp4", ".gif", ""])
def test_the_file_is_the_same(tmp_path: Path, dtype: torch.dtype, channels: int, size: Any, suffix: str) -> None:
    made = pixels(dtype, channels, *size)
    paths = [tmp_path / f"{name}{suffix}" for name in ("float", "bytes")]
    save_video(to_frames(made), paths[0], 8)
    (rounded,) = next(frame_chunks([made.unsqueeze(0)]))
    assert rounded.dtype == np.uint8 and rounded.shape == (4, *size, 3)
    save_video(rounded, paths[1], 8)
    files = [sorted(path.iterdir()) if path.is_dir() else [path] for path in paths]
    assert len(files[0]) == len(files[1]) > 0
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


class Ffmpeg:
    """Keeps what is written to it."""

    returncode = 0

    def __init__(self) -> None:
        self.stdin, self.written = self, bytearray()

    def __enter__(self) -> Ffmpeg:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def write(self, part: Any) -> None:
        self.written += part

    def communicate(self) -> tuple[bytes, bytes]:
        return b"", b""


@pytest.mark.parametrize("size", [(256, 256), (257, 256), (256, 259)])
def test_ffmpeg_is_given_every_pixel_and_a_repeated_line_for_odd_sides(size: Any, monkeypatch: Any) -> None:
    """Also of frames whose memory is not in order."""
    process = Ffmpeg()
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: process)
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, *size), dtype=np.uint8).transpose(0, 2, 3, 1)
    save_video(frames, video.STDOUT, 8)
    even = np.pad(frames, ((0, 0), (0, size[0] % 2), (0, size[1] % 2), (0, 0)), mode="edge")
    assert bytes(process.written) == even.tobytes()


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(UsageError, match="latents of 16 channels are not pixels"):
        to_bytes(torch.zeros(16, 3, 4, 4))
    with pytest.raises(UserError, match="NaN or Inf"):
        to_bytes(torch.full((1, 2, 4, 4), float("inf")))
