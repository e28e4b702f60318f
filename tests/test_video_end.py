"""Absolute positions end with the rotary table: a video that is too long is refused, an endless one ends there."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from recipe_case import write_teacher
from safetensors.torch import load_file
from stream_case import HEIGHT, STEPS, WIDTH, alone, batch_of, prompt

from mla_convert import StreamingMLAPipeline
from mla_convert.cli import main
from mla_convert.errors import UsageError
from mla_convert.mla.window import CausalConfig
from mla_convert.run.extent import video_end
from mla_convert.run.stream import stream_chunks

POSITIONS = 11
CAUSAL = {"num_frames_per_block": 2, "window_frames": 5, "sink_frames": 1, "sink_positions": "absolute"}
REFUSED = "12 latent frames are more than the rotary table's 11 positions; make a shorter video, or set "
REFUSED += "causal.sink_positions: window for endless videos"
NOTICE = "ends after 10 latent frames, with the rotary table; set causal.sink_positions: window"


def short(causal: dict[str, Any] = CAUSAL, **changes: Any) -> Any:
    """A dense model with a rotary table of 11 positions."""
    return pico.dense_model(causal=causal, rope_max_seq_len=POSITIONS, **changes)


@pytest.mark.parametrize(
    ("causal", "positions", "num_frames", "end"),
    [
        ({}, 1024, None, None),
        ({}, 1024, 5000, 5000),
        ({"sink_positions": "absolute"}, 1024, None, 1023),
        ({"sink_positions": "absolute"}, 1024, 1024, 1024),
        ({"sink_positions": "absolute", "independent_first_frame": True}, 1024, None, 1024),
        ({"sink_positions": "absolute", "num_frames_per_block": 4}, 1024, None, 1024),
        # A window that is longer than the table fills until the table ends.
        ({"window_frames": 30}, 20, None, 18),
        ({"window_frames": 20}, 20, None, None),
    ],
)
def test_where_a_video_ends(causal: dict[str, Any], positions: int, num_frames: int | None, end: int | None) -> None:
    assert video_end(CausalConfig(**causal), positions, num_frames) == end


@pytest.mark.parametrize("given", [{"num_frames": 21}, {"num_frames": None, "given": 21}])
def test_what_does_not_fit_is_refused_with_its_own_remedy(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"21 latent frames .* 20 positions; .*causal\.sink_positions: window"):
        video_end(CausalConfig(sink_positions="absolute"), 20, **given)
    with pytest.raises(UsageError, match=r"causal\.window_frames, now 30, to at most the table's positions"):
        video_end(CausalConfig(window_frames=30), 20, **given)


@pytest.mark.parametrize("causal", [CAUSAL, {"num_frames_per_block": 2, "window_frames": 13}])
def test_the_last_frame_that_is_promised_can_be_made(causal: dict[str, Any]) -> None:
    model = short(causal)
    assert alone(model, prompt(0), POSITIONS).shape[1] == POSITIONS
    cache = model.init_cache(1, HEIGHT, WIDTH)
    cache.frames_seen = POSITIONS - 1
    with pytest.raises(IndexError, match="outside the table of 11"):
        model.forward_chunk(*pico.inputs(1, 2, HEIGHT, WIDTH), cache)


@pytest.mark.parametrize("family", sorted(pico.BUILDERS))
def test_a_rollout_without_an_end_ends_with_the_last_whole_chunk(family: str, caplog: Any) -> None:
    model = short({**CAUSAL, "window_frames": 9}, family=family)
    text, settings = prompt(0).unsqueeze(0), {"num_inference_steps": 1}
    chunks = list(stream_chunks(model, text, None, HEIGHT, WIDTH, **settings))
    assert f"the video {NOTICE}" in caplog.text
    assert torch.equal(torch.cat(chunks, dim=2)[0], alone(model, prompt(0), 10, shift=1.0, **settings))
    caplog.clear()
    alone(model, prompt(0), POSITIONS)
    assert caplog.text == ""


def test_a_converted_model_ends_there_too_and_by_the_window_does_not() -> None:
    text = prompt(0).unsqueeze(0)
    for causal, made in ((CAUSAL, 5), ({**CAUSAL, "sink_positions": "window"}, 9)):
        model = pico.convert(short(causal), position="rotate_on_read", kv_lora_rank=20)
        chunks = stream_chunks(model, text, None, HEIGHT, WIDTH, num_inference_steps=1)
        assert len(list(itertools.islice(chunks, 9))) == made


def test_too_long_a_rollout_is_refused_before_its_cache_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, start = short(), pico.inputs(1, 12, HEIGHT, WIDTH)[0]
    monkeypatch.setattr(model, "init_cache", None)
    for frames, more in ((12, {}), (None, {"start": start})):
        with pytest.raises(UsageError) as caught:
            next(stream_chunks(model, prompt(0).unsqueeze(0), frames, HEIGHT, WIDTH, **more))
        assert str(caught.value) == REFUSED


def test_a_stream_without_an_end_leaves_at_the_table_and_the_others_go_on(caplog: Any) -> None:
    model = short()
    batch, made = batch_of(model, 2), {}
    early = batch.join(prompt(0), seed=1)
    made[early] = [chunk.latents for chunk in batch.step()]
    late = batch.join(prompt(1), seed=2)
    for chunk in batch.chunks():
        made.setdefault(chunk.stream, []).append(chunk.latents)
        assert chunk.last == (chunk.first == 8)
        if chunk.stream == early and chunk.last:
            assert batch.active == [late] and f"stream {early} {NOTICE}" in caplog.text
    assert f"stream {late} {NOTICE}" in caplog.text and sorted(batch.pool.free) == [0, 1]
    for number in (early, late):
        assert pico.relative_error(torch.cat(made[number], dim=1), alone(model, prompt(number), 10, number + 1)) < 1e-5
    with pytest.raises(UsageError, match="it may have ended"):
        batch.leave(early)


def test_a_stream_that_does_not_fit_is_refused_when_it_joins(caplog: Any) -> None:
    batch = batch_of(short(), 1)
    for given in ({"num_frames": 12}, {"start": pico.inputs(1, 12, HEIGHT, WIDTH)[0][0]}):
        with pytest.raises(UsageError) as caught:
            batch.join(prompt(0), **given)
        assert str(caught.value) == REFUSED and batch.pool.free == [0]
    batch.join(prompt(0), num_frames=POSITIONS)
    assert [chunk.last for chunk in batch.chunks()][-1] and caplog.text == ""


def test_the_pipeline_refuses_at_the_call_and_ends_a_stream(caplog: Any) -> None:
    pipe = StreamingMLAPipeline(short())
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 8 * HEIGHT, "width": 8 * WIDTH, "output_type": "latent"}
    settings = {"prompt_embeds": prompt(0), **size, **STEPS}
    for length in ({"num_frames": 45}, {"seconds": 45 / 16}):
        with pytest.raises(UsageError) as caught:
            pipe.stream(**length, **settings)
        assert str(caught.value) == REFUSED
    made = torch.cat(list(pipe.stream(**settings)), dim=2)
    assert made.shape[2] == 10 and f"the video {NOTICE}" in caplog.text


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A digits model with chunks of three frames, absolute positions and a table of 16."""
    folder = write_teacher(tmp_path / "teacher")
    change(folder, rope_max_seq_len=16, sink_positions="absolute")
    return folder


def change(folder: Path, rope_max_seq_len: int, sink_positions: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"rope_max_seq_len": rope_max_seq_len, "causal": {**config["causal"], "sink_positions": sink_positions}}
    (folder / "config.json").write_text(json.dumps(config))


def generate(folder: Path, out: Path, *more: str) -> int:
    return main(["generate", str(folder), "--prompt", "7", "--steps", "1", "--out", str(out), *more])


@pytest.mark.parametrize("length", [["--frames", "17"], ["--seconds", "2.1"], []])
def test_generate_refuses_before_it_loads(
    teacher: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, length: list[str]
) -> None:
    monkeypatch.setattr("mla_convert.pipeline.execution.load_models", None)
    assert generate(teacher, tmp_path / "x.mp4", *length) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {17 if length else 21} latent frames are more than the rotary table's 16 positions")
    assert not (tmp_path / "x.mp4").exists()


def test_an_endless_video_is_finished_at_the_table(teacher: Path, tmp_path: Path, capsys: Any) -> None:
    assert generate(teacher, tmp_path / "frames", "--endless") == 0
    told = capsys.readouterr()
    assert "the video ends after 15 latent frames, with the rotary table; set causal.sink_positions" in told.err
    assert len(list((tmp_path / "frames").iterdir())) == 15 and "15 frames" in " ".join(told.out.split())


def test_the_remedy_helps_a_checkpoint_that_is_there(teacher: Path, tmp_path: Path) -> None:
    assert generate(teacher, tmp_path / "a.safetensors", "--frames", "16") == 0
    change(teacher, rope_max_seq_len=16, sink_positions="window")
    assert generate(teacher, tmp_path / "b.safetensors", "--frames", "30") == 0
    absolute, window = (load_file(tmp_path / f"{name}.safetensors")["latents"] for name in "ab")
    # Until the window of 9 frames moves on, both count alike.
    assert window.shape[1] == 30 and torch.equal(window[:, :9], absolute[:, :9])
