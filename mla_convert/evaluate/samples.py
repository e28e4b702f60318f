"""Embeds generated videos in a page, as a playable mp4 and a film strip."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..run.video import Frames, save_video, side_by_side

_THUMBNAIL, _VIDEO_WIDTH, _PIXEL_ART = 240, 480, 64


@dataclass(frozen=True)
class Comparison:
    """Videos of one prompt by teacher and student from the same noise: float32 `[F, H, W, 3]` in [0, 1]."""

    prompt: str
    teacher: Frames
    student: Frames
    fps: float = 8


def embed(comparison: Comparison) -> dict[str, Any]:
    """Both videos as one mp4 and a few frames of each as pictures, all as data URIs."""
    frames = comparison.teacher.shape[0]
    teacher, student = _shrunk(comparison.teacher, _VIDEO_WIDTH), _shrunk(comparison.student, _VIDEO_WIDTH)
    both = side_by_side(teacher, student, labels=None)
    height, width = both.shape[1:3]
    return {
        "prompt": comparison.prompt,
        **film_strips({"teacher": comparison.teacher, "student": comparison.student}),
        "video": _playing(both, comparison.fps),
        "width": width,
        "height": height,
        "seconds": f"{frames / comparison.fps:.1f}",
    }


def film_strips(videos: Mapping[str, Frames]) -> dict[str, Any]:
    """Film strips of videos that share one shape: frame `numbers`, `strips`, `small` and aspect `ratio`.

    Frames are evenly spaced. Long pixel art shows consecutive frames from its beginning and its end instead.
    """
    frames, height, width = next(iter(videos.values())).shape[:3]
    small = max(height, width) <= _PIXEL_ART
    shown = _shown_frames(frames, small)
    return {
        "numbers": shown,
        "strips": [
            {"name": name, "frames": [_still(video[index]) for index in shown]} for name, video in videos.items()
        ],
        "small": small,
        "ratio": f"{width} / {height}",
    }


def _shown_frames(frames: int, small: bool) -> list[int]:
    count = min(9 if small else 6, frames)
    if small and frames > 2 * count:
        # A bouncing digit has a period of four frames, so evenly spaced frames may all show the same place.
        first = (count + 1) // 2
        return [*range(first), *range(frames - (count - first), frames)]
    return [int(index) for index in np.unique(np.linspace(0, frames - 1, count).round().astype(int))]


def embed_video(frames: Frames, fps: float) -> dict[str, Any]:
    """One video as a data URI, with its `width` and `height`."""
    shrunk = _shrunk(frames, _VIDEO_WIDTH)
    return {"video": _playing(shrunk, fps), "width": shrunk.shape[2], "height": shrunk.shape[1]}


def _playing(frames: Frames, fps: float) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "video.mp4"
        save_video(frames, path, fps)
        return _data_uri("video/mp4", path.read_bytes())


def _shrunk(frames: Frames, width: int) -> Frames:
    """Resize frames that are wider than `width`."""
    if frames.shape[2] <= width:
        return frames
    size = (width, round(frames.shape[1] * width / frames.shape[2]))
    pictures = [Image.fromarray(_to_bytes(frame)).resize(size, Image.Resampling.LANCZOS) for frame in frames]
    return np.stack([np.asarray(picture, dtype=np.float32) / 255 for picture in pictures])


def _still(frame: Frames) -> str:
    """Encode one frame as a data URI: lossless PNG for pixel art, a small JPEG otherwise."""
    picture = Image.fromarray(_to_bytes(frame))
    buffer = io.BytesIO()
    if max(picture.size) <= _PIXEL_ART:
        picture.save(buffer, "PNG", optimize=True)
        return _data_uri("image/png", buffer.getvalue())
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    picture.save(buffer, "JPEG", quality=85)
    return _data_uri("image/jpeg", buffer.getvalue())


def _to_bytes(frame: Frames) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return (frame.clip(0, 1) * 255).round().astype(np.uint8)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
