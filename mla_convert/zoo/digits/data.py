"""Render videos of real handwritten digits that move and bounce, and define the prompts that describe them.

A prompt is a class, a start cell and a direction. The digit moves one cell of four pixels per frame and bounces at the
border of a 16x16 frame. Pixels are float32 in [-1, 1]. Source of the digits: scikit-learn's `load_digits`, 1,797 images
of 8x8 (Alpaydin & Kaynak, UCI ML repository, 1998).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import quoted

FRAME, DIGIT, STEP = 16, 8, 4
CELLS = (FRAME - DIGIT) // STEP + 1
TEXT_DIM, TEXT_TOKENS = 32, 3
CLIP_FRAMES = 16
CONTRAST = 2.0 / 16.0
SHIFT, GUIDANCE = 3.0, 3.0

_VERTICAL = {"up": -1, "": 0, "down": 1}
_HORIZONTAL = {"left": -1, "": 0, "right": 1}
DIRECTIONS = {
    "-".join(filter(None, (v, h))): (dy, dx) for v, dy in _VERTICAL.items() for h, dx in _HORIZONTAL.items() if dy or dx
}
_PROMPT = re.compile(r"^\s*(?:an?\s+)?([0-9])(?:\s+at\s+([0-9])\s*,\s*([0-9]))?(?:\s+moving\s+([a-z-]+))?\s*$")


@dataclass(frozen=True)
class Prompt:
    """A digit class 0-9, a start cell (row, column) in 0-2, and a direction, a key of DIRECTIONS."""

    digit: int
    row: int
    column: int
    direction: str

    def __str__(self) -> str:
        return f"{self.digit} at {self.row},{self.column} moving {self.direction}"

    def path(self, num_frames: int) -> np.ndarray:
        """The top-left pixel (y, x) of the digit in every frame, int64 `[F, 2]`."""
        dy, dx = DIRECTIONS[self.direction]
        steps = np.arange(num_frames)
        return STEP * np.stack([_bounce(self.row + dy * steps), _bounce(self.column + dx * steps)], axis=1)

    def embedding(self) -> Tensor:
        """The `encoder_hidden_states` of the prompt, float32 `[3, 32]`: one-hot class, start cell, direction."""
        out = torch.zeros(TEXT_TOKENS, TEXT_DIM)
        dy, dx = DIRECTIONS[self.direction]
        out[0, self.digit] = 1
        out[1, 10 + self.row] = out[1, 15 + self.column] = 1
        out[2, 21 + dy] = out[2, 24 + dx] = 1
        return out


def parse_prompt(text: str) -> Prompt:
    """Parse a prompt such as `7`, `7 moving up-left` or `7 at 2,1 moving up-left`. Raises ValueError."""
    match = _PROMPT.match(text.lower())
    if not match:
        raise ValueError(f"cannot read the digits prompt {quoted(text)}; write for example '7 at 2,1 moving up-left'")
    digit, row, column, direction = match.groups()
    direction = direction or "down-right"
    if direction not in DIRECTIONS:
        raise ValueError(f"unknown direction {quoted(direction)}; one of {', '.join(DIRECTIONS)}")
    cell = (int(row or 0), int(column or 0))
    if max(cell) >= CELLS:
        last = CELLS - 1
        raise ValueError(f"start cell {cell[0]},{cell[1]} is outside the {CELLS}x{CELLS} cells 0,0 to {last},{last}")
    return Prompt(int(digit), *cell, direction)


def prompt_of(embedding: Tensor) -> Prompt:
    """The prompt with this embedding `[3, 32]`."""
    dy, dx = int(embedding[2, 20:23].argmax()) - 1, int(embedding[2, 23:26].argmax()) - 1
    direction = next(name for name, step in DIRECTIONS.items() if step == (dy, dx))
    row, column = int(embedding[1, 10:13].argmax()), int(embedding[1, 15:18].argmax())
    return Prompt(int(embedding[0, :10].argmax()), row, column, direction)


def _bounce(cells: np.ndarray) -> np.ndarray:
    """Reflect unbounded cell numbers into `[0, CELLS)`."""
    period = 2 * (CELLS - 1)
    wrapped = np.mod(cells, period)
    return np.minimum(wrapped, period - wrapped)


@functools.cache
def all_prompts(split: str) -> tuple[Prompt, ...]:
    """The 648 prompts of `train` or the 72 of `heldout`, a fixed random split of all combinations."""
    prompts = [
        Prompt(digit, row, column, direction)
        for digit in range(10)
        for row in range(CELLS)
        for column in range(CELLS)
        for direction in DIRECTIONS
    ]
    heldout = set(np.random.default_rng(0).permutation(len(prompts))[: len(prompts) // 10].tolist())
    return tuple(p for i, p in enumerate(prompts) if (i in heldout) == (split == "heldout"))


@functools.cache
def digit_images(split: str) -> tuple[Tensor, Tensor]:
    """Images float32 `[N, 8, 8]` in [-1, 1] and classes int64 `[N]`; one in five of each class is held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    rank = np.empty(len(order), dtype=np.int64)
    for digit in range(10):
        members = order[bunch.target[order] == digit]
        rank[members] = np.arange(len(members))
    chosen = (rank % 5 == 0) == (split == "heldout")
    images = torch.from_numpy(bunch.images[chosen]).float() * CONTRAST - 1
    return images, torch.from_numpy(bunch.target[chosen]).long()


def render(image: Tensor, path: np.ndarray) -> Tensor:
    """Render a video `[1, F, 16, 16]` of an `[8, 8]` digit that moves along a path of top-left pixels `[F, 2]`."""
    video = torch.full((1, len(path), FRAME, FRAME), -1.0)
    for frame, (y, x) in enumerate(path):
        video[0, frame, y : y + DIGIT, x : x + DIGIT] = image
    return video


@dataclass
class Batch:
    """Videos `[B, 1, F, 16, 16]`, embeddings `[B, 3, 32]` and the prompts they belong to."""

    videos: Tensor
    embeddings: Tensor
    prompts: list[Prompt]


def sample_batch(
    batch_size: int,
    num_frames: int,
    generator: np.random.Generator,
    digits: str = "train",
    prompts: str = "train",
) -> Batch:
    """Sample random prompts of split `prompts` and render each with a random digit of split `digits`."""
    images, classes = digit_images(digits)
    pool = all_prompts(prompts)
    chosen = [pool[i] for i in generator.integers(len(pool), size=batch_size)]
    videos = []
    for prompt in chosen:
        members = (classes == prompt.digit).nonzero()[:, 0]
        videos.append(render(images[members[generator.integers(len(members))]], prompt.path(num_frames)))
    return Batch(torch.stack(videos), torch.stack([p.embedding() for p in chosen]), chosen)
