"""Other threads may change a `StreamBatch` while a round runs; a round may leave streams out."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pico
import pytest
import torch
from stream_case import FLOAT32, alone, batch_of, prompt
from torch import Tensor

from mla_convert.errors import UsageError
from mla_convert.run.batch import StreamChunk


def is_alone(chunks: list[StreamChunk], expected: Tensor) -> None:
    assert pico.relative_error(torch.cat([chunk.latents for chunk in chunks], dim=1), expected) < FLOAT32


def during_a_pass(model: Any, act: Callable[[], Any], patch: pytest.MonkeyPatch) -> list[Any]:
    """Let another thread `act` once during the second pass of a model; the list gets its result or exception."""
    forward, calls, results = model.forward_chunk, itertools.count(), []

    def run() -> None:
        try:
            results.append(act())
        except Exception as error:
            results.append(error)

    def interrupted(*args: Any, **kwargs: Any) -> Tensor:
        if next(calls) == 1:
            thread = threading.Thread(target=run)
            thread.start()
            thread.join(30)
            assert not thread.is_alive()
        out: Tensor = forward(*args, **kwargs)
        return out

    patch.setattr(model, "forward_chunk", interrupted)
    return results


def test_a_stream_leaves_and_another_takes_its_lane_during_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico.dense_model()
    batch = batch_of(model, 2)
    gone, other = batch.join(prompt(0), seed=0), batch.join(prompt(1), seed=1, num_frames=8)
    chunks = batch.step()

    def exchange() -> int:
        batch.leave(gone)
        return batch.join(prompt(2), seed=2, num_frames=6)

    with monkeypatch.context() as patch:
        results = during_a_pass(model, exchange, patch)
        made = batch.step()
    assert [chunk.stream for chunk in made] == [other]
    chunks = [*chunks, *made, *batch.chunks()]
    is_alone([chunk for chunk in chunks if chunk.stream == other], alone(model, prompt(1), 8, 1))
    is_alone([chunk for chunk in chunks if chunk.stream == results[0]], alone(model, prompt(2), 6, 2))
    assert sorted(batch.pool.free) == [0, 1]


def test_a_prompt_that_changes_during_a_round_applies_from_the_next_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico.dense_model()
    batch = batch_of(model, 1)
    number = batch.join(prompt(0), num_frames=8)
    chunks = batch.step()
    with monkeypatch.context() as patch:
        results = during_a_pass(model, lambda: batch.change_prompt(number, prompt(5)), patch)
        chunks += batch.step()
    assert results == [None]
    chunks += batch.chunks()
    later = prompt(5).unsqueeze(0)
    is_alone(chunks, alone(model, prompt(0), 8, prompt_at=lambda first: later if first == 4 else None))


def test_a_second_round_at_the_same_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico.dense_model()
    batch = batch_of(model, 1)
    batch.join(prompt(0), num_frames=4)
    with monkeypatch.context() as patch:
        results = during_a_pass(model, batch.step, patch)
        chunks = batch.step()
    (refusal,) = results
    assert isinstance(refusal, UsageError) and "another thread is running a round of this batch" in str(refusal)
    is_alone([*chunks, *batch.chunks()], alone(model, prompt(0), 4))


def test_a_round_leaves_streams_out() -> None:
    model = pico.dense_model()
    batch = batch_of(model, 3)
    numbers = [batch.join(prompt(seed), seed=seed, num_frames=8) for seed in range(2)]
    made: dict[int, list[StreamChunk]] = {number: [] for number in numbers}
    for takes_part in ([0], [0, 7], [], [1], [1, 0], None, None, None):
        chunks = batch.step(takes_part)
        expected = [number for number in numbers if takes_part is None or number in takes_part]
        assert [chunk.stream for chunk in chunks] == [n for n in expected if not (made[n] and made[n][-1].last)]
        for chunk in chunks:
            made[chunk.stream].append(chunk)
    assert not batch.active
    for number in numbers:
        is_alone(made[number], alone(model, prompt(number), 8, number))


def test_two_batches_run_in_two_threads() -> None:
    model, made = pico.dense_model(), {}

    def run(seed: int) -> None:
        batch = batch_of(model, 1)
        batch.join(prompt(seed), seed=seed, num_frames=8)
        made[seed] = list(batch.chunks())

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for seed, chunks in made.items():
        is_alone(chunks, alone(model, prompt(seed), 8, seed))
    assert len(made) == 2
