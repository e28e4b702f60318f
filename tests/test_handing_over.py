"""A chunk is handed over before it is written to the cache, which happens only if another chunk follows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pico
import pytest
import torch
from stream_case import HEIGHT, STEPS, WIDTH, prompt
from torch import Tensor

from mla_convert.distill.rollout import self_rollout
from mla_convert.flow import sampling_times
from mla_convert.run.stream import stream_chunks

CHUNKS = 4


def model() -> Any:
    return pico.convert(pico.dense_model(), **pico.LAYOUTS[0])


def frames_of(model: Any) -> int:
    return int(model.causal.chunks(99)[CHUNKS - 1][1])


def rolled(model: Any, frames: int | None, **settings: Any) -> Iterator[Tensor]:
    return stream_chunks(model, prompt(0).unsqueeze(0), frames, HEIGHT, WIDTH, **{**STEPS, **settings})


def texts_written(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The texts of the passes that have written to a cache so far."""
    forward, written = model.forward_chunk, []

    def recorded(x: Tensor, t: Tensor, text: Tensor, *rest: Any, write: bool, **more: Any) -> Tensor:
        if write:
            written.append(text)
        out: Tensor = forward(x, t, text, *rest, write=write, **more)
        return out

    monkeypatch.setattr(model, "forward_chunk", recorded)
    return written


def test_a_chunk_is_written_when_the_next_one_is_asked_for(monkeypatch):
    streamed = model()
    written = texts_written(streamed, monkeypatch)
    counts = [len(written) for _ in rolled(streamed, frames_of(streamed))]
    assert counts == list(range(CHUNKS))
    assert len(written) == CHUNKS - 1


def test_a_rollout_without_an_end_writes_what_was_asked_to_continue(monkeypatch):
    streamed = model()
    written = texts_written(streamed, monkeypatch)
    chunks = rolled(streamed, None)
    for _ in range(3):
        next(chunks)
    chunks.close()
    assert len(written) == 2


def test_a_chunk_is_written_with_its_own_prompt(monkeypatch):
    streamed = model()
    written = texts_written(streamed, monkeypatch)
    prompts = [prompt(seed).unsqueeze(0) for seed in range(CHUNKS)]
    coming = iter(prompts)
    list(rolled(streamed, frames_of(streamed), prompt_at=lambda first: next(coming)))
    assert all(torch.equal(text, own) for text, own in zip(written, prompts[:-1], strict=True))


@pytest.mark.parametrize("context_noise", [0.0, 0.2])
@pytest.mark.parametrize("recache", [False, True])
def test_whoever_receives_a_chunk_may_change_it(context_noise, recache):
    streamed = model()
    frames = frames_of(streamed)
    settings = {
        "context_noise": context_noise,
        "recache": recache,
        "prompt_at": lambda first: prompt(1).unsqueeze(0) if first > frames // 2 else None,
    }
    expected = list(rolled(streamed, frames, **settings))
    found = []
    for chunk in rolled(streamed, frames, **settings):
        found.append(chunk.clone())
        chunk.fill_(9.0)
    assert all(map(torch.equal, found, expected))
    start = expected[0].clone()
    for chunk in rolled(streamed, frames, start=start, **settings):
        chunk.fill_(9.0)
    assert torch.equal(start, expected[0])


@pytest.mark.parametrize("context_noise", [0.0, 0.2])
def test_a_rollout_in_training_writes_and_draws_as_much(context_noise, monkeypatch):
    """The last chunk is not written, but its noise is drawn: whatever is drawn afterwards stays what it was."""
    trained = model()
    written = texts_written(trained, monkeypatch)
    size, text, times = (frames_of(trained), HEIGHT, WIDTH), prompt(0).unsqueeze(0), sampling_times(2, 3.0)
    own, other = (torch.Generator().manual_seed(7) for _ in range(2))
    video = self_rollout(trained, text, size, times, 1, own, context_noise=context_noise)
    assert len(written) == CHUNKS - 1
    streamed = rolled(trained, size[0], seed=other, context_noise=context_noise)
    torch.testing.assert_close(video.detach(), torch.cat(list(streamed), dim=2), rtol=0, atol=1e-6)
    assert torch.equal(own.get_state(), other.get_state())
