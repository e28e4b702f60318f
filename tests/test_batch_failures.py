"""What fails in a `StreamBatch` ends one stream with its reason, or leaves every stream as it was."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import pico
import pytest
import torch
from stream_case import FLOAT32, HEIGHT, WIDTH, alone, batch_of, prompt
from torch import Tensor

from mla_convert.errors import UsageError, UserError
from mla_convert.run.batch import RoundError, StreamBatch, StreamChunk, StreamError


def is_alone(chunks: list[StreamChunk], expected: Tensor) -> None:
    assert pico.relative_error(torch.cat([chunk.latents for chunk in chunks], dim=1), expected) < FLOAT32


def failing_at(model: Any, call: int, error: Exception, patch: pytest.MonkeyPatch) -> None:
    """Let the pass number `call` of a model raise an error."""
    forward, calls = model.forward_chunk, itertools.count()

    def failing(*args: Any, **kwargs: Any) -> Tensor:
        if next(calls) == call:
            raise error
        out: Tensor = forward(*args, **kwargs)
        return out

    patch.setattr(model, "forward_chunk", failing)


def test_a_failed_round_names_its_streams_and_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico.dense_model()
    batch = batch_of(model, 2, context_noise=0.1)
    old = batch.join(prompt(0), seed=1, num_frames=10)
    made = {old: [*batch.step(), *batch.step()]}
    young = batch.join(prompt(1), seed=2, num_frames=4)
    error = RuntimeError("device-side\nassert")
    with monkeypatch.context() as patch:
        failing_at(model, 4, error, patch)
        with pytest.raises(RoundError, match=f"a pass of stream {young} failed: RuntimeError: device-side assert") as e:
            batch.step()
    assert e.value.streams == [young] and e.value.__cause__ is error and isinstance(e.value, UserError)
    for chunk in batch.chunks():
        made.setdefault(chunk.stream, []).append(chunk)
    is_alone(made[old], alone(model, prompt(0), 10, 1, context_noise=0.1))
    is_alone(made[young], alone(model, prompt(1), 4, 2, context_noise=0.1))


@pytest.mark.parametrize("recache", [False, True])
def test_no_stream_moves_on_when_memory_ends_while_chunks_are_copied(
    recache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every copy of a round fails once, with several passes and streams; all chunks arrive, none twice."""
    model = pico.dense_model()
    clone = Tensor.clone
    expected = {number: alone(model, prompt(number), 6, seed=number) for number in range(3)}
    batch = batch_of(model, 3, lanes_per_pass=2, recache=recache)
    for number in range(3):
        batch.join(prompt(number), seed=number, num_frames=6)
    made: dict[int, list[StreamChunk]] = {number: [] for number in range(3)}
    failures, fails_at = 0, 0
    while batch.active:
        calls = itertools.count()

        def scarce(x: Tensor, calls: Any = calls, fails_at: int = fails_at) -> Tensor:
            if next(calls) == fails_at:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return clone(x)

        before = [stream.frames_seen for stream in batch._streams.values()]
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "clone", scarce)
            try:
                chunks = batch.step()
            except torch.OutOfMemoryError:
                failures, fails_at = failures + 1, fails_at + 1
                assert [stream.frames_seen for stream in batch._streams.values()] == before
                continue
        fails_at = 0
        for chunk in chunks:
            made[chunk.stream].append(chunk)
    assert failures >= 3 * 3 * (1 + recache)
    for number in range(3):
        is_alone(made[number], expected[number])


def test_a_cpu_without_memory_is_no_fault_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico.dense_model()
    batch = batch_of(model, 1)
    batch.join(prompt(0), num_frames=4)
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward_chunk", lambda *_, **__: torch.empty(1 << 50))
        with pytest.raises(MemoryError, match="allocate") as raised:
            batch.step()
    assert isinstance(raised.value.__cause__, RuntimeError)
    is_alone(list(batch.chunks()), alone(model, prompt(0), 4))


def test_a_batch_that_ran_out_of_memory_goes_on_in_smaller_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico.dense_model()
    forward = model.forward_chunk

    def small(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        out: Tensor = forward(x, *args, **kwargs)
        return out

    monkeypatch.setattr(model, "forward_chunk", small)
    batch = batch_of(model, 4)
    for number in range(4):
        batch.join(prompt(number), seed=number, num_frames=4)
    with pytest.raises(torch.OutOfMemoryError):
        batch.step()
    batch.lanes_per_pass = 2
    chunks = list(batch.chunks())
    for number in range(4):
        mine = [chunk for chunk in chunks if chunk.stream == number]
        is_alone(mine, alone(model, prompt(number), 4, seed=number))


def broken(first: int, stop: int) -> Tensor:
    if first:
        raise OSError("the camera\nis gone")
    return torch.zeros(1, 2, stop - first, HEIGHT, WIDTH)


def misshapen(first: int, stop: int) -> Tensor:
    return torch.zeros(1, 2, stop - first, HEIGHT + bool(first), WIDTH)


def diverging(first: int, stop: int) -> Tensor:
    return torch.full((1, 2, stop - first, HEIGHT, WIDTH), torch.nan if first else 0.0)


@pytest.mark.parametrize(
    ("source", "reason", "cause"),
    [
        (broken, "its source failed: OSError: the camera is gone", OSError),
        (misshapen, r"its source failed: UsageError: the source has shape \[1, 2, 2, 7, 4\]", UsageError),
        (diverging, "its chunk contains NaN or Inf", type(None)),
    ],
)
def test_a_stream_that_fails_ends_alone(
    source: Callable[[int, int], Tensor], reason: str, cause: type, caplog: pytest.LogCaptureFixture
) -> None:
    model = pico.dense_model()
    batch = batch_of(model, 3)
    failing = batch.join(prompt(1), source=source, strength=0.5)
    other = batch.join(prompt(0), seed=3, num_frames=8)
    # It shares the passes of the one that fails.
    like = batch.join(prompt(2), seed=4, source=torch.zeros(2, 8, HEIGHT, WIDTH), strength=0.5)
    chunks = batch.step()
    assert all(chunk.error is None for chunk in chunks)
    ended, *rest = batch.step()
    assert (ended.stream, ended.first, ended.latents.shape[1], ended.last) == (failing, 2, 0, True)
    assert isinstance(ended.error, StreamError) and isinstance(ended.error, UserError)
    assert ended.error.stream == failing and isinstance(ended.error.__cause__, cause)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == str(ended.error) and "\n" not in line
    with pytest.raises(StreamError, match=f"stream {failing} has ended: {reason}"):
        raise ended.error
    assert batch.active == [other, like] and len(batch.pool.free) == 1
    chunks += [*rest, *batch.chunks()]
    is_alone([chunk for chunk in chunks if chunk.stream == other], alone(model, prompt(0), 8, 3))
    given = {"source": torch.zeros(1, 2, 8, HEIGHT, WIDTH), "strength": 0.5}
    is_alone([chunk for chunk in chunks if chunk.stream == like], alone(model, prompt(2), 8, 4, **given))


def test_a_condition_that_fails_ends_its_stream() -> None:
    model = pico.dense_model()
    model.condition_kinds = {"image_latents": "frames"}
    batch: StreamBatch = batch_of(model, 2)

    def at(first: int, stop: int) -> Tensor:
        raise KeyError("frame")

    failing = batch.join(prompt(1), conditions={"image_latents": at})
    other = batch.join(prompt(0), num_frames=2)
    ended, made = batch.step()
    assert ended.stream == failing and "its conditions failed: KeyError: 'frame'" in str(ended.error)
    assert made.stream == other and made.error is None and made.last


def test_a_source_that_failed_is_not_asked_again_when_the_round_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = pico.dense_model(), []

    def gone(first: int, stop: int) -> Tensor:
        asked.append(first)
        raise OSError("gone")

    batch = batch_of(model, 2)
    failing = batch.join(prompt(0), source=gone)
    other = batch.join(prompt(1), num_frames=2)
    with monkeypatch.context() as patch:
        failing_at(model, 0, torch.OutOfMemoryError("CUDA out of memory"), patch)
        with pytest.raises(torch.OutOfMemoryError):
            batch.step()
    assert batch.active == [failing, other]
    ended, made = batch.step()
    assert asked == [0] and ended.error is not None and made.latents.shape[1] == 2


def test_streams_that_have_gone_leave_no_tensors_behind() -> None:
    """Whether they end, leave, fail or change their prompt."""
    batch = batch_of(pico.dense_model(layers=1), 3, recache=True, num_inference_steps=1)

    def come_and_go() -> int:
        batch.join(prompt(0), num_frames=4, start=torch.zeros(2, 2, HEIGHT, WIDTH))
        batch.join(prompt(1), source=broken)
        leaves = batch.join(prompt(2))
        batch.step()
        batch.change_prompt(leaves, prompt(3))
        batch.step()
        batch.leave(leaves)
        assert not batch.active
        # An exception that was caught refers to itself through the frames of its traceback.
        gc.collect()
        return sum(issubclass(type(one), Tensor) for one in gc.get_objects())

    assert len({come_and_go() for _ in range(5)}) == 1


def test_a_prompt_that_is_not_finite_is_refused() -> None:
    batch = batch_of(pico.dense_model(layers=1), 1)
    bad = prompt(0)
    bad[1, 2] = torch.nan
    with pytest.raises(UsageError, match="the prompt of a stream contains NaN or Inf"):
        batch.join(bad)
    number = batch.join(prompt(0))
    with pytest.raises(UsageError, match="contains NaN or Inf"):
        batch.change_prompt(number, bad)
