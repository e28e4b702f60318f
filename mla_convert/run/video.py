"""Writes the frames of a rollout as mp4, gif or a folder of PNG files, or to a pipe.

Frames are `[F, H, W, 3]`, F video frames of H x W pixels: float32 in [0, 1], or uint8 where they are only written.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..devices import bring_weights
from ..distill.normalization import vae_statistics
from ..errors import UsageError, UserError
from ..files import atomic_file, atomic_folder
from .output import to_output

Frames = NDArray[np.float32]
Written = NDArray[np.float32] | NDArray[np.uint8]
"""Frames as a file takes them: the same file from float32 as from what `to_bytes` makes of the same pixels."""

SUFFIXES = (".mp4", ".gif")
STDOUT = Path("-")
MIN_PIXELS = 256
MAX_GIF_FPS = 50
"""Browsers show frames of less than 20 ms more slowly."""
_MACROBLOCK = 16
# A fragment begins at every key frame, and there is a key frame every second.
_FRAGMENTED = "-movflags +frag_keyframe+empty_moov+default_base_moof -tune zerolatency -flush_packets 1"
_GAP, _LABEL, _INK, _PAPER = 8, 24, 0.9, 0.2


def to_frames(video: Tensor) -> Frames:
    """Frames `[F, H, W, 3]` of one video of pixels `[C, F, H, W]` in [-1, 1], C = 1 or 3.

    Raises UserError when the video contains NaN or Inf, and UsageError for latents, which `frame_chunks` decodes.
    """
    _check_pixels(video)
    return to_output(video.unsqueeze(0), "np")[0].numpy()


def to_bytes(video: Tensor) -> NDArray[np.uint8]:
    """Like `to_frames`, but uint8, as a file has them: rounded on the device, from which a quarter is then copied."""
    _check_pixels(video)
    return to_output(video.unsqueeze(0), "pil")[0].numpy()


def _check_pixels(video: Tensor) -> None:
    channels = video.shape[0]
    if channels not in (1, 3):
        raise UsageError(f"latents of {channels} channels are not pixels; give the VAE that decodes them")


def denormalized(vae: Any, latents: Tensor) -> Tensor:
    """Latents `[B, C, F, H, W]` of a transformer on the scale that `vae` decodes, in its dtype and on its device."""
    bring_weights(vae)
    mean, std = vae_statistics(vae, vae.dtype)
    return latents.to(vae.device, vae.dtype) * std + mean


def check_suffix(path: Path) -> None:
    """Raise UsageError unless `save_video` can write `path`; call it before a long rollout."""
    if path == STDOUT:
        return
    if path.suffix.lower() not in (*SUFFIXES, ""):
        raise UsageError(f"cannot write {path}; use .mp4, .gif, or a name without suffix for a folder of PNG files")
    if path.suffix == "" and path.is_dir() and any(not _is_frame(file) for file in path.iterdir()):
        raise UsageError(f"{path} exists and contains other files than video frames; choose another folder")


def save_video(frames: Written | Iterable[Written], path: Path, fps: float, min_pixels: int = MIN_PIXELS) -> None:
    """Write frames, or an iterable of chunks of frames, in the format of `path`'s suffix.

    Equal input gives equal bytes. `-` writes a fragmented mp4 to stdout, which can be played while it grows. Frames
    with a side below `min_pixels` are enlarged by a whole factor, pixel by pixel. Nothing is left half-written. Raises
    UsageError for an unknown suffix, UserError when the disk is full, and BrokenPipeError when stdout is closed.
    """
    check_suffix(path)
    chunks: Iterator[Written] = iter([frames] if isinstance(frames, np.ndarray) else frames)
    first = next(chunks, None)
    if first is None or len(first) == 0:
        raise UserError(f"no frames to write to {path}")
    factor = scale_factor(first.shape[1], first.shape[2], min_pixels)
    images = (_to_uint8(frame, factor) for chunk in itertools.chain([first], chunks) for frame in chunk)
    match path.suffix.lower():
        case _ if path == STDOUT:
            _write_mp4(images, "pipe:1", fps, _FRAGMENTED)
        case ".mp4":
            with atomic_file(path) as temporary:
                _write_mp4(images, str(temporary), fps, "-movflags +faststart", path)
        case ".gif":
            with atomic_file(path) as temporary:
                _write_gif(images, temporary, fps)
        case _:
            with atomic_folder(path) as folder:
                for index, image in enumerate(images):
                    Image.fromarray(image).save(folder / f"frame_{index:05d}.png")


def scale_factor(height: int, width: int, min_pixels: int = MIN_PIXELS) -> int:
    """Smallest whole factor that enlarges both sides to at least `min_pixels`, possibly 1.

    A larger factor, up to twice as large, is preferred if it makes both sides divisible by 16, the macroblock of H.264.
    """
    least = math.ceil(min_pixels / min(height, width))
    if least <= 1:
        return 1
    whole = math.lcm(*(_MACROBLOCK // math.gcd(_MACROBLOCK, side) for side in (height, width)))
    rounded = math.ceil(least / whole) * whole
    return rounded if rounded <= 2 * least else least


def side_by_side(teacher: Frames, student: Frames, labels: tuple[str, str] | None = ("teacher", "student")) -> Frames:
    """Both videos in one, with a thin gap between them and a line of text above each unless `labels` is None.

    Two videos `[F, H, W, 3]` are placed side by side. Two stacks of N videos `[N, F, H, W, 3]` become N columns, the
    teacher's row above the student's. Sides below 256 pixels are enlarged for single videos, below 128 for stacks.
    Raises ValueError when the shapes differ.
    """
    if teacher.shape != student.shape:
        raise ValueError(f"cannot compare videos of {teacher.shape} and {student.shape}")
    if teacher.ndim == 4:
        rows, titles = [[teacher, student]], [list(labels)] if labels else []
    else:
        rows, titles = [list(teacher), list(student)], [[label] for label in labels or ()]
    height, width = teacher.shape[-3:-1]
    factor = scale_factor(height, width, MIN_PIXELS if len(rows) == 1 else MIN_PIXELS // 2)
    height, width = height * factor, width * factor
    label = _LABEL if labels else 0
    columns, pitch = len(rows[0]), height + label + _GAP
    size = (len(rows) * pitch - _GAP, columns * (width + _GAP) - _GAP)
    canvas = np.full((teacher.shape[-4], *size, 3), _PAPER, dtype=np.float32)
    for row, videos in enumerate(rows):
        top = row * pitch + label
        for column, video in enumerate(videos):
            left = column * (width + _GAP)
            canvas[:, top : top + height, left : left + width] = _enlarge(video, factor)
        for column, title in enumerate(titles[row] if titles else []):
            left = column * (width + _GAP)
            canvas[:, top - label : top, left : left + width] = _text(title, width, label)
    return canvas


def _text(text: str, width: int, height: int) -> Frames:
    """One line of text, `[height, width, 3]`."""
    image = Image.new("L", (width, height), round(255 * _PAPER))
    font = ImageFont.load_default(size=14)
    ImageDraw.Draw(image).text((4, height // 2), text, fill=round(255 * _INK), font=font, anchor="lm")
    return np.repeat(np.asarray(image, dtype=np.float32)[..., None] / 255, 3, axis=-1)


def _enlarge(frames: NDArray[Any], factor: int) -> NDArray[Any]:
    """Repeat every pixel of `[..., H, W, 3]`; with a factor of 1 nothing is copied."""
    if factor == 1:
        return frames
    return frames.repeat(factor, axis=-3).repeat(factor, axis=-2)


def _to_uint8(frame: Written, factor: int) -> NDArray[np.uint8]:
    rounded = frame if frame.dtype == np.uint8 else (frame.clip(0, 1) * 255).round().astype(np.uint8)
    return _enlarge(rounded, factor)


def _write_mp4(
    images: Iterable[NDArray[np.uint8]], target: str, fps: float, container: str, shown: Path = STDOUT
) -> None:
    """Encode H.264 in yuv420p, which every browser and player supports; odd sides get one repeated line.

    One encoder thread and no metadata, so the bytes depend only on the frames. `container` holds ffmpeg's arguments for
    the kind of mp4. Errors name the file `shown`.
    """
    images = iter(images)
    first = next(images)
    height, width = first.shape[:2]
    pad, odd = ((0, height % 2), (0, width % 2), (0, 0)), height % 2 or width % 2
    arguments = f"""
        -v error -xerror -y -f rawvideo -pix_fmt rgb24 -s {width + width % 2}x{height + height % 2} -r {fps} -i -
        -an -c:v libx264 -crf 16 -threads 1 -pix_fmt yuv420p -vf scale=out_color_matrix=bt709:out_range=tv
        -colorspace bt709 -color_primaries bt709 -color_trc bt709 -color_range tv
        -map_metadata -1 -fflags +bitexact -flags:v +bitexact -g {max(1, round(fps)) if target == "pipe:1" else 250}
        {container} -f mp4
    """
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *arguments.split(), target]
    # In its own session, so that Ctrl-C in a terminal reaches only this process.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdin is not None
        try:
            for image in itertools.chain([first], images):
                padded = np.pad(image, pad, mode="edge") if odd else image
                process.stdin.write(np.ascontiguousarray(padded).data)
        except BrokenPipeError:
            pass  # ffmpeg stopped; its exit code and message say why
        except BaseException:
            process.kill()
            raise
        _, message = process.communicate()
    if process.returncode:
        text = message.decode(errors="replace").strip()
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOENT, errno.EISDIR):
            if os.strerror(code) in text:
                raise OSError(code, os.strerror(code), str(shown))
        if "Broken pipe" in text:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        last = text.splitlines()[-1] if text else f"exit code {process.returncode}"
        raise UserError(f"ffmpeg could not encode {shown}: {last}")


def _write_gif(images: Iterable[NDArray[np.uint8]], path: Path, fps: float) -> None:
    """Write a GIF that loops forever; its durations are in hundredths of a second."""
    pictures = (Image.fromarray(image) for image in images)
    first = next(pictures)
    duration = max(10 * round(100 / fps), 1000 // MAX_GIF_FPS)
    first.save(path, "GIF", save_all=True, append_images=pictures, duration=duration, loop=0)


def _is_frame(file: Path) -> bool:
    return file.suffix == ".png" and file.stem.startswith("frame_")
