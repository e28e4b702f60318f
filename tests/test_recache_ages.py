"""Streams of different ages that shared passes: each writes its own window again for a new prompt."""

from __future__ import annotations

from typing import Any

import pico
import pytest
import torch
from stream_case import FLOAT32, alone, batch_of, no_memory_for, prompt
from torch import Tensor

CHUNK = 2
OLD, NEW = prompt(0), prompt(1)
# The window holds one frame beyond whole chunks, or a chunk of a sink.
WINDOWS = [{"window_frames": 7}, {"window_frames": 6, "sink_frames": 1}]


def model_of(window: dict[str, int]) -> Any:
    return pico.dense_model(causal={"num_frames_per_block": CHUNK, **window})


@pytest.mark.parametrize("window", WINDOWS)
def test_a_younger_stream_writes_its_own_window(window: dict[str, int]) -> None:
    model = model_of(window)
    batch = batch_of(model, 2, recache=True)
    batch.join(prompt(5), seed=5, num_frames=40)
    for _ in range(5):
        batch.step()
    young = batch.join(OLD, num_frames=16)
    made: list[Tensor] = []
    while young in batch.active:
        if len(made) * CHUNK == 12:
            batch.change_prompt(young, NEW)
        made += [chunk.latents for chunk in batch.step() if chunk.stream == young]
    expected = alone(model, OLD, 16, prompt_at={12: NEW.unsqueeze(0)}.get, recache=True)
    assert pico.relative_error(torch.cat(made, 1), expected) < FLOAT32


@pytest.mark.parametrize("window", WINDOWS)
def test_an_older_stream_does_so_after_a_failed_round(window: dict[str, int]) -> None:
    """The failed round has taken the slots of its next chunk; a stream alone is what it should be like."""
    made = []
    for shared in (False, True):
        model = model_of(window)
        batch = batch_of(model, 3, recache=True)
        if shared:
            young = batch.join(prompt(5), seed=5, num_frames=40)
            for _ in range(4):
                batch.step([young])
        old = batch.join(OLD, num_frames=40)
        for _ in range(6):
            batch.step([old])
        other = batch.join(prompt(3, tokens=4), seed=2, num_frames=40)
        with no_memory_for(model, tokens=4), pytest.raises(torch.OutOfMemoryError):
            batch.step()
        batch.leave(other)
        batch.change_prompt(old, NEW)
        made += [chunk.latents for chunk in batch.step([old])]
    assert pico.relative_error(made[1], made[0]) < FLOAT32
