"""Several streams of one pipeline at once: each has its own state, and they take turns."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from recipe_case import write_teacher
from torch import Tensor

from mla_convert import StreamingMLAPipeline
from mla_convert.export.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny digits model; pixels are latents, and prompts need no text encoder."""
    pipe = StreamingMLAPipeline(load_checkpoint(write_teacher(tmp_path_factory.mktemp("digits") / "teacher")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, prompt: str, **settings: Any) -> np.ndarray:
    return np.concatenate(list(pipe.stream(prompt, **settings)), axis=1)


def test_streams_in_threads_are_what_they_are_alone(digits: Any) -> None:
    """With different sources and numbers of steps; no two passes run at the same time."""
    video = digits("3", num_frames=12, output_type="pil").frames[0]
    settings = [
        {"num_frames": 12, "num_inference_steps": 3},
        {"source": video, "strength": 0.5, "num_inference_steps": 4},
        {"num_frames": 9, "num_inference_steps": 1, "ahead": 0},
    ]
    expected = [drawn(digits, "7", **more) for more in settings]
    made: dict[int, np.ndarray] = {}
    running, most = [0], [0]
    forward = digits.transformer.forward_chunk

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.002)
        out: Tensor = forward(*args, **kwargs)
        running[0] -= 1
        return out

    def run(index: int) -> None:
        made[index] = drawn(digits, "7", **settings[index])

    digits.transformer.forward_chunk = counted
    try:
        threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    finally:
        digits.transformer.forward_chunk = forward
    assert most == [1] and not digits._calls.running
    for index, frames in enumerate(expected):
        np.testing.assert_array_equal(made[index], frames)


@pytest.mark.parametrize("name", ["interrupt", "_interrupt"])
def test_an_interrupt_in_a_callback_ends_its_own_video(name: str, digits: Any) -> None:
    def callback(pipe: Any, step: int, *rest: Any) -> None:
        assert not pipe.interrupt
        if step == 3:
            setattr(pipe, name, True)

    other = digits.stream("3", num_frames=9, ahead=0)
    frames = [next(other)]
    ended = drawn(digits, "7", callback_on_step_end=callback, num_inference_steps=2)
    assert ended.shape[1] == 6
    assert not digits.interrupt
    frames += list(other)
    assert sum(x.shape[1] for x in frames) == 9


def test_an_interrupt_elsewhere_ends_all_that_run_and_no_later_one(digits: Any) -> None:
    streams = [digits.stream(prompt, ahead=0) for prompt in ("3", "7")]
    for stream in streams:
        next(stream)
    digits.interrupt = True
    assert digits.interrupt and [list(stream) for stream in streams] == [[], []]
    assert not digits.interrupt and drawn(digits, "7", num_frames=6).shape[1] == 6


def test_closing_one_stream_ends_its_chunk_at_the_current_step(digits: Any) -> None:
    other = digits.stream("3", num_frames=9, ahead=0)
    frames = [next(other)]
    steps, reached, closing = [], threading.Event(), threading.Event()
    here = threading.get_ident()

    def callback(pipe: Any, step: int, *rest: Any) -> None:
        assert threading.get_ident() != here
        steps.append(step)
        if step == 25:
            reached.set()
            closing.wait(30)

    stream = digits.stream("7", num_inference_steps=20, callback_on_step_end=callback)
    next(stream)
    assert reached.wait(30)
    threading.Timer(1, closing.set).start()
    stream.close()
    assert steps[-1] == 25
    frames += list(other)
    assert sum(x.shape[1] for x in frames) == 9


def test_a_camera_that_waits_holds_up_no_other_stream(digits: Any) -> None:
    frame, waits = threading.Event(), threading.Event()

    def camera() -> Iterator[Image.Image]:
        for _ in range(4):
            yield Image.new("L", (16, 16))
        waits.set()
        frame.wait(60)

    live = digits.stream("3", source=camera(), strength=0.5)
    made = [next(live)]
    assert waits.wait(30)
    assert drawn(digits, "7", num_frames=6).shape[1] == 6
    frame.set()
    assert sum(x.shape[1] for x in [*made, *live]) == 4


def test_hooks_are_freed_when_a_stream_ends_and_no_other_computes(digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A paused stream keeps no weights on the device; inside a callback of another, nothing is moved."""
    freed = []
    monkeypatch.setattr(digits, "maybe_free_model_hooks", lambda: freed.append(1))
    paused = digits.stream("3", num_frames=6, ahead=0)
    next(paused)
    for count in (1, 2):
        drawn(digits, "7", num_frames=3)
        assert len(freed) == count

    def callback(pipe: Any, *rest: Any) -> None:
        drawn(pipe, "7", num_frames=3, num_inference_steps=1, ahead=0)
        assert len(freed) == 2

    drawn(digits, "7", num_frames=3, num_inference_steps=2, callback_on_step_end=callback)
    assert len(freed) == 3
    paused.close()
    assert len(freed) == 4


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_callback_can_start_a_stream_of_its_pipeline(ahead: int, digits: Any) -> None:
    """Also where that stream is not read to its end, and where its own callback starts another."""
    settings: dict[str, Any] = {"num_frames": 9, "num_inference_steps": 2}
    expected, inner = drawn(digits, "7", **settings), drawn(digits, "3", **settings)
    made: list[Any] = []
    kept: list[Any] = []

    def innermost(pipe: Any, step: int, *rest: Any) -> None:
        if step == 1:
            made.append(drawn(pipe, "3", ahead=ahead, **settings))

    def callback(pipe: Any, step: int, *rest: Any) -> None:
        if step == 1:
            made.append(drawn(pipe, "3", ahead=ahead, callback_on_step_end=innermost, **settings))
            kept.append(pipe.stream("3", ahead=ahead, **settings))
            made.append(next(kept[0]))

    def run() -> None:
        made.append(drawn(digits, "7", callback_on_step_end=callback, ahead=ahead, **settings))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    made[2] = np.concatenate([made[2], *kept[0]], axis=1)
    for frames, wanted in zip(made, [inner, inner, inner, expected], strict=True):
        np.testing.assert_array_equal(frames, wanted)
    assert not digits._calls.running and not digits._turns._held


def test_closing_a_stream_that_waits_for_its_turn_is_quick(digits: Any) -> None:
    waiting = digits.stream("7", num_inference_steps=1)
    next(waiting)
    with digits._turns.turn():
        next(waiting)
        while not digits._turns._line:
            time.sleep(0.001)
        start = time.monotonic()
        waiting.close()
        assert time.monotonic() - start < 5
        assert not digits._turns._line and not digits._calls.running


def test_an_interrupt_while_a_stream_waits_leaves_the_line(digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(digits._turns.changed, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt):
            drawn(digits, "7", num_frames=6, ahead=0)
    assert not digits._calls.running and not digits._turns._line
    assert drawn(digits, "7", num_frames=6).shape[1] == 6


def test_an_interrupt_before_the_first_chunk_ends_a_stream(digits: Any) -> None:
    streams = [digits.stream("7", num_frames=6, ahead=ahead) for ahead in (0, 1)]
    digits.interrupt = True
    assert [list(stream) for stream in streams] == [[], []]
    assert not digits.interrupt
    forgotten = digits.stream("7", num_frames=6)
    assert len(digits._calls.running) == 1
    del forgotten
    assert not digits._calls.running


def test_pipelines_of_one_transformer_share_its_turns(digits: Any) -> None:
    twin = StreamingMLAPipeline(digits.transformer)
    assert twin._turns is digits._turns
    stream = digits.stream("7", ahead=0)
    next(stream)
    twin.interrupt = True
    assert next(stream).shape[1]
    assert copy.deepcopy(twin)._turns is not twin._turns


def test_a_pipeline_can_be_copied(digits: Any) -> None:
    stream = digits.stream("7", ahead=0)
    next(stream)
    twin = copy.deepcopy(digits)
    assert twin("7", num_frames=3).frames.shape[1] == 3 and not twin._calls.running
