"""Decodes the frames of a video file for a VAE, with the ffmpeg of imageio-ffmpeg."""

from __future__ import annotations

import contextlib
import errno
import re
import stat
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
NO_FILE, EMPTY, NOT_OPENED = "there is no such file", "the file is empty", "it cannot be opened: "
"""Reasons for which a file is looked at again when an encoding is resumed; others are final."""
PLACEHOLDER = "bring {disk} back or put an empty file in {place}"
"""What to do when a disk fails; a video that is taken out of a folder would be missing in the digest of its names."""

# What a disk or a server answers that is away; anything else concerns a file alone.
_OUTAGE = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENODEV}
_BLOCK = 1 << 20

_ADDRESS = re.compile(r"\[[^\]]* @ 0x[0-9a-f]+\] ")


class UnusableVideo(Exception):
    """Raised for a video that is missing, not readable, broken or too short; the message is the reason."""


class ShortVideo(UnusableVideo):
    """Raised for a whole video that is too short."""


def read_frames(path: Path, frames: int, height: int, width: int, fps: float) -> Tensor:
    """The first `frames` frames at `fps` frames per second, uint8 `[F, H, W, 3]`.

    Frames are resized to cover height x width pixels, then cropped at the center. Raises
    UnusableVideo if the file is not there or cannot be opened, if it ends too early, if any of these frames is damaged,
    or if decoding takes longer than `DECODE_SECONDS`; UserError if its disk fails.
    """
    require_readable(path)
    # Limit the input time: `-frames` would race with errors in later frames.
    command = _command(path, height, width, fps, f"-t {(frames + 1) / fps:.6f}")
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=DECODE_SECONDS
        )
    except subprocess.TimeoutExpired:
        require_readable(path)
        raise UnusableVideo(f"it takes longer than {DECODE_SECONDS:g} seconds to decode") from None
    if done.returncode:
        # The disk may have gone away under ffmpeg.
        require_readable(path, whole=True)
        raise UnusableVideo(f"it cannot be decoded: {_reason(done.stderr, path)}")
    decoded = torch.frombuffer(bytearray(done.stdout) or bytearray(1), dtype=torch.uint8)
    found = len(decoded) // (height * width * 3)
    if found < frames:
        raise ShortVideo(f"it is too short: {found} of {frames} frames at {fps:g} per second")
    return decoded.view(found, height, width, 3)[:frames]


def problem_of(path: Path) -> str:
    """Why `path` is no video, as its entry in the file system tells; "" if it may be one. Raises UserError."""
    try:
        found = _explained(path, path.stat)
    except UnusableVideo as error:
        return str(error)
    if not stat.S_ISREG(found.st_mode):
        return f"{NOT_OPENED}it is {'a folder' if stat.S_ISDIR(found.st_mode) else 'not a file'}"
    return "" if found.st_size else EMPTY


def require_readable(path: Path, whole: bool = False) -> None:
    """Read the first byte of a file, or with `whole` all of it.

    Raises UserError if its disk is away, where the video may be good, and UnusableVideo for other reasons.
    """

    def read() -> None:
        with path.open("rb") as file:
            while file.read(_BLOCK if whole else 1) and whole:
                pass

    _explained(path, read)


def is_outage(error: OSError) -> bool:
    """Whether `error` is that of a disk or server that is away, and not of one file."""
    return error.errno in _OUTAGE


def _explained(path: Path, ask: Callable[[], Result]) -> Result:
    """`ask()`, with UserError for a disk that is away and UnusableVideo for other errors of the file at `path`."""
    try:
        return ask()
    except (FileNotFoundError, NotADirectoryError):
        raise UnusableVideo(NO_FILE) from None
    except ValueError:
        raise UnusableVideo(f"{NOT_OPENED}it is no file name") from None
    except OSError as error:
        reason = error.strerror or str(error)
        if not is_outage(error):
            raise UnusableVideo(f"{NOT_OPENED}{reason}") from None
        remedy = PLACEHOLDER.format(disk="its disk", place="its place")
        raise UserError(
            f"cannot open {path}: {reason}; {remedy}, and run again, with --resume if it had begun"
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
