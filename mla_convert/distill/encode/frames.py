"""Decodes the frames of a video file for a VAE, with the ffmpeg of imageio-ffmpeg."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

import imageio_ffmpeg
import torch
from torch import Tensor

from ...errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

DECODE_SECONDS = 600.0
"""How long ffmpeg may take for the frames of one clip."""
NO_FILE = "there is no such file"

_ADDRESS = re.compile(r"\[[^\]]* @ 0x[0-9a-f]+\] ")


class UnusableVideo(Exception):
    """Raised for a video that is missing, broken or too short; the message is the reason."""


class ShortVideo(UnusableVideo):
    """Raised for a whole video that is too short."""


def read_frames(path: Path, frames: int, height: int, width: int, fps: float) -> Tensor:
    """Return the first `frames` frames at `fps` frames per second, uint8 `[F, H, W, 3]`.

    Frames are resized to cover height x width pixels, then cropped at the center. Raises
    UnusableVideo if there is no such file, if it ends too early, if any of these frames is damaged, or if decoding
    takes longer than `DECODE_SECONDS`; UserError if the file cannot be opened.
    """
    _require_readable(path)
    # Limit the input time: `-frames` would race with errors in later frames.
    command = _command(path, height, width, fps, f"-t {(frames + 1) / fps:.6f}")
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=DECODE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise UnusableVideo(f"it takes longer than {DECODE_SECONDS:g} seconds to decode") from None
    if done.returncode:
        raise UnusableVideo(f"it cannot be decoded: {_reason(done.stderr, path)}")
    decoded = torch.frombuffer(bytearray(done.stdout) or bytearray(1), dtype=torch.uint8)
    found = len(decoded) // (height * width * 3)
    if found < frames:
        raise ShortVideo(f"it is too short: {found} of {frames} frames at {fps:g} per second")
    return decoded.view(found, height, width, 3)[:frames]


def _require_readable(path: Path) -> None:
    """Raise UserError if the first byte of a file cannot be read: its disk is away, and the video may be good."""
    try:
        with path.open("rb") as file:
            file.read(1)
    except (FileNotFoundError, NotADirectoryError):
        raise UnusableVideo(NO_FILE) from None
    except OSError as error:
        raise UserError(
            f"cannot open {path}: {error.strerror or error}; bring its disk back or take the file away, and continue "
            "with --resume"
        ) from None


def stream_frames(path: Path, height: int, width: int, fps: float) -> Generator[Tensor]:
    """Yield all frames of a file like `read_frames`, uint8 `[H, W, 3]`, decoded no faster than they are consumed.

    Raises UnusableVideo at a damaged frame, after yielding those before it. Closing the generator stops ffmpeg.
    """
    size = height * width * 3
    with tempfile.TemporaryFile() as stderr:
        # In its own session, so that Ctrl-C in a terminal reaches only this process. stderr goes to a file,
        # because nothing reads it during decoding, and a full pipe would block ffmpeg.
        process = subprocess.Popen(
            _command(path, height, width, fps),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            while len(frame := process.stdout.read(size)) == size:
                yield torch.frombuffer(bytearray(frame), dtype=torch.uint8).view(height, width, 3)
            if process.wait():
                stderr.seek(0)
                raise UnusableVideo(f"it cannot be decoded: {_reason(stderr.read(), path)}")
        finally:
            process.kill()
            with contextlib.suppress(OSError):
                process.stdout.close()
            process.wait()


def _command(path: Path, height: int, width: int, fps: float, limit: str = "") -> list[str]:
    """The ffmpeg command that writes the frames of a file to stdout; `limit` has options for its input."""
    filters = [
        f"fps={fps:g}",
        f"scale={width}:{height}:force_original_aspect_ratio=increase:flags=bicubic+accurate_rnd+full_chroma_int",
        "format=rgb24",
        f"crop={width}:{height}",
    ]
    # One thread: several clips are decoded in parallel, and error messages are reproducible.
    before = f"-nostdin -v error -xerror -threads 1 {limit} -i"
    after = "-map 0:v:0 -an -sn -dn -f rawvideo -pix_fmt rgb24"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *before.split(), f"file:{path}", *after.split()]
    return [*command, "-vf", ",".join(filters), "-"]


def to_pixels(frames: Tensor) -> Tensor:
    """Convert uint8 frames `[F, H, W, 3]` to float32 pixels `[3, F, H, W]` in [-1, 1]."""
    return frames.permute(3, 0, 1, 2).float().div(127.5).sub(1)


def ahead(function: Callable[[Item], Result], items: Iterable[Item], count: int) -> Iterator[Result]:
    """Yield `function(item)` for every item, in order; threads compute up to `count` results ahead."""
    rest = iter(items)
    with ThreadPoolExecutor(count) as pool:
        waiting: deque[Future[Result]] = deque(pool.submit(function, item) for item in islice(rest, count))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in islice(rest, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()


def _reason(message: bytes, path: Path) -> str:
    """The first line of ffmpeg's error output, without memory addresses and the path."""
    lines = _ADDRESS.sub("", message.decode(errors="replace")).replace(f"file:{path}", "the file").splitlines()
    return next((line.strip() for line in lines if line.strip()), "ffmpeg gave no reason")
