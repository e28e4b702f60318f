"""Rollouts of random models, alone and in a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pico
import pytest
import torch
from torch import Tensor

from mla_convert.run.batch import StreamBatch
from mla_convert.run.stream import stream_chunks

HEIGHT, WIDTH = 6, 4
STEPS = {"num_inference_steps": 2, "shift": 3.0}
# Relative to the largest magnitude. A matrix product of another size may sum in another order, and a rollout feeds
# what it made back; the largest error seen on a CPU is 1.2e-6.
FLOAT32 = 1e-5

# The dense model, and every position with the own chunk one way or the other.
VARIANTS = [None, *pico.VARIANTS[::3], pico.VARIANTS[4]]


def prompt(seed: int, tokens: int = 3) -> Tensor:
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed))


def alone(model: Any, text: Tensor, num_frames: int, seed: int = 0, **settings: Any) -> Tensor:
    """The rollout `[C, F, H, W]` of one prompt."""
    chunks = stream_chunks(model, text.unsqueeze(0), num_frames, HEIGHT, WIDTH, seed=seed, **{**STEPS, **settings})
    return torch.cat(list(chunks), dim=2)[0]


def batch_of(model: Any, lanes: int, **settings: Any) -> StreamBatch:
    return StreamBatch(model, lanes, HEIGHT, WIDTH, **{**STEPS, **settings})


@contextlib.contextmanager
def no_memory_for(model: Any, tokens: int) -> Iterator[None]:
    """Inside the context, passes of prompts with `tokens` tokens run out of memory."""
    forward = model.forward_chunk

    def failing(x: Tensor, t: Tensor, text: Tensor, *rest: Any, **more: Any) -> Tensor:
        if text.shape[1] == tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        out: Tensor = forward(x, t, text, *rest, **more)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "forward_chunk", failing)
        yield
