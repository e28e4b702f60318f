"""Classify single frames of generated video with a small model that was trained on the real digits.

`python -m mla_convert.zoo.digits.classifier` trains it again and prints its accuracy.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .data import CELLS, FRAME, STEP, digit_images, render

WEIGHTS = Path(__file__).parent / "classifier.safetensors"


class FrameClassifier(nn.Module):
    """Maps frames `[N, 16, 16]` in [-1, 1] to class logits `[N, 10]`, by way of `features` `[N, 64]`."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(48, 64, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(64, 64, 4),
            nn.GELU(),
        )
        self.head = nn.Linear(64, 10)

    def features(self, frames: Tensor) -> Tensor:
        return self.trunk(frames.unsqueeze(1).float()).amax(dim=(2, 3))

    def forward(self, frames: Tensor) -> Tensor:
        return self.head(self.features(frames))


@functools.cache
def load_classifier() -> FrameClassifier:
    """Load the trained classifier that ships with the package."""
    model = FrameClassifier()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval().requires_grad_(False)


def classify(videos: Tensor) -> Tensor:
    """The class of every frame, int64 `[B, F]`, for videos `[B, 1, F, 16, 16]`."""
    frames = videos[:, 0]
    with torch.inference_mode():
        logits = load_classifier().to(frames.device)(frames.flatten(0, 1))
    return logits.argmax(-1).view(frames.shape[:2])


def _placed(images: Tensor, generator: np.random.Generator) -> Tensor:
    """Place each digit in one frame at a random pixel position, `[N, 16, 16]`."""
    span = STEP * (CELLS - 1) + 1
    paths = generator.integers(span, size=(len(images), 1, 2))
    return torch.stack([render(image, path)[0, 0] for image, path in zip(images, paths, strict=True)])


def train(epochs: int = 60, seed: int = 0) -> tuple[FrameClassifier, float]:
    """Train on the training digits with added noise; return the model and its held-out accuracy."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    images, classes = digit_images("train")
    model = FrameClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    batches = (len(images) + 63) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * batches)
    for _ in range(epochs):
        frames = _placed(images, generator)
        frames = frames + 0.15 * torch.rand(len(frames), 1, 1) * torch.randn_like(frames)
        for chosen in torch.from_numpy(generator.permutation(len(images))).split(64):
            loss = F.cross_entropy(model(frames[chosen]), classes[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    heldout, labels = digit_images("heldout")
    with torch.inference_mode():
        hits = [
            (model.eval()(_placed(heldout, generator)).argmax(-1) == labels).float().mean().item() for _ in range(8)
        ]
    return model, float(np.mean(hits))


if __name__ == "__main__":
    assert FRAME == 16
    trained, accuracy = train()
    save_file({k: v.contiguous() for k, v in trained.state_dict().items()}, WEIGHTS)
    print(f"held-out accuracy {accuracy:.4f}, {WEIGHTS.stat().st_size} bytes")
