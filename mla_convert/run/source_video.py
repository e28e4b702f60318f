"""Opens the source of a rollout from a file or a camera: latents, or pictures that are read only as needed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..distill.encode.frames import UnusableVideo, stream_frames, to_pixels
from ..distill.encode.streaming import StreamingEncoder
from ..errors import UsageError, UserError
from .extent import check_size
from .latents import first_video_frame
from .start import LATENTS, boxed, boxed_pixels, fitted, read_latents, read_pictures

Pictures = Path | Iterable[Image.Image]


class SourceVideo:
    """A `source` for `stream_chunks`: the latents `[1, C, F, h, w]` of a video; `shape` is their (C, h, w).

    `frames` yields its pictures, uint8 `[H, W, c]` at the size of the video, and is read as chunks need them. The first
    latent frame is one picture, every other `temporal` pictures. Pictures left over at the end, too few for a latent
    frame, are dropped. `encode_with` sets the VAE that encodes them; a pixel-space model needs none.
    """

    def __init__(self, frames: Generator[Tensor], shape: tuple[int, int, int], temporal: int) -> None:
        self.frames, self.shape, self.temporal = frames, shape, temporal
        self.encoder: StreamingEncoder | None = None
        self._encoded: Callable[[], None] | None = None
        self._seen: list[Tensor] = []

    def look(self) -> None:
        """Read the first picture now. Raises UserError if there is none."""
        self._seen = list(itertools.islice(self.frames, 1))
        if not self._seen:
            raise UserError("the source has no pictures")

    def encode_with(self, vae: Any, done: Callable[[], None] | None = None) -> None:
        """Encode the pictures with `vae`; `done` is called after every chunk."""
        self.encoder, self._encoded = StreamingEncoder(vae), done

    def __call__(self, first: int, stop: int) -> Tensor:
        """Latents of the frames `[first, stop)`, or those that are left.

        Raises UserError for pictures that cannot be read.
        """
        begin, end = (first_video_frame(frame, self.temporal) for frame in (first, stop))
        taken = list(itertools.islice(itertools.chain(self._seen, self.frames), end - begin))
        self._seen = []
        opens = 1 if first == 0 and taken else 0
        whole = len(taken) - (len(taken) - opens) % self.temporal
        if not whole:
            return torch.empty(1, self.shape[0], 0, *self.shape[1:])
        video = torch.stack(taken[:whole])
        if self.encoder is None:
            return boxed_pixels(video).unsqueeze(0)
        latents = self.encoder(to_pixels(video).unsqueeze(0))
        if self._encoded is not None:
            self._encoded()
        return latents

    def close(self) -> None:
        """Close the file without reading the rest."""
        self.frames.close()


def open_source(
    source: Pictures, shape: tuple[int, int, int], scale: tuple[int, int], fps: float
) -> Tensor | SourceVideo:
    """The `source` of a rollout with latents of `shape` (C, h, w) and (temporal, spatial) `scale` (`latent_scale`).

    A `.safetensors` file holds `latents` `[C, F, h, w]`, returned as `[1, C, F, h, w]`, float32. Any other file is a
    picture, or a video that ffmpeg reads at `fps` frames per second, resized to cover the rollout and cropped to its
    center. For a pixel-space model, with 1 or 3 channels, the file is an image, a GIF or an mp4, and every frame is
    averaged down, or enlarged, to the size of the rollout. An iterable of pictures, such as a camera, is read as is.

    Raises UserError for a file that cannot be read, before anything is computed, and UsageError for latents that do not
    fit.
    """
    if isinstance(source, Path):
        if not source.is_file():
            raise UserError(f"{source} {'is a folder' if source.is_dir() else 'does not exist'}; give a source file")
        if source.suffix == LATENTS:
            return _latents(source, shape)
    (channels, height, width), (temporal, spatial) = shape, scale
    pictures = read_pictures(source) if isinstance(source, Path) else source
    if spatial == 1:
        frames = _boxed(pictures, channels, height, width)
    elif isinstance(source, Path) and not _is_picture(source):
        frames = _decoded(source, height * spatial, width * spatial, fps)
    else:
        frames = _fitted(pictures, height * spatial, width * spatial)
    video = SourceVideo(frames, shape, temporal)
    if isinstance(source, Path):
        video.look()
    return video


def _is_picture(path: Path) -> bool:
    """Whether a file is a single picture, of which ffmpeg drops the only frame at low rates."""
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1) == 1
    except (OSError, UnidentifiedImageError):
        return False


def _latents(path: Path, shape: tuple[int, int, int]) -> Tensor:
    latents = read_latents(path, "source")
    channels, _, height, width = latents.shape
    check_size(f"the source {path}", (channels, height, width), shape, "the source's latent size")
    return latents.unsqueeze(0)


def _decoded(path: Path, height: int, width: int, fps: float) -> Generator[Tensor]:
    try:
        yield from stream_frames(path, height, width, fps)
    except UnusableVideo as error:
        raise UserError(f"the source {path} cannot be used: {error}") from None


def _boxed(pictures: Iterable[Image.Image], channels: int, height: int, width: int) -> Generator[Tensor]:
    for picture in pictures:
        yield boxed(_checked(picture), channels, height, width)


def _fitted(pictures: Iterable[Image.Image], height: int, width: int) -> Generator[Tensor]:
    for picture in pictures:
        yield fitted(_checked(picture), height, width)


def _checked(picture: Any) -> Image.Image:
    if not isinstance(picture, Image.Image):
        raise UsageError(f"a source must be latents, a file or PIL images, not {type(picture).__name__}")
    return picture
