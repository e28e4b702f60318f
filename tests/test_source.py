"""Rollouts that restyle a video: the amount of noise and the length, alone and in a batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pico
import pytest
import torch
from stream_case import FLOAT32, HEIGHT, STEPS, WIDTH, alone, batch_of, prompt
from torch import Tensor

from mla_convert.denoise import Schedule
from mla_convert.errors import UsageError
from mla_convert.flow import add_noise, sampling_times, shift_time
from mla_convert.mla.conditions import FramesAt
from mla_convert.run.rounds import Rounds
from mla_convert.run.stream import stream_chunks

FEW = (1000, 750, 500, 250)


def clean(frames: int, seed: int = 5, batch: int = 1) -> Tensor:
    return torch.randn(batch, 2, frames, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


def asked_for(video: Tensor, asked: list[tuple[int, int]] | None = None) -> FramesAt:
    """A source that is a function, and the frames it was asked for."""

    def frames_at(first: int, stop: int) -> Tensor:
        if asked is not None:
            asked.append((first, stop))
        return video[:, :, first:stop]

    return frames_at


def chunks_of(model: Any, frames: int | None = None, batch: int = 1, **settings: Any) -> list[Tensor]:
    texts = torch.stack([prompt(seed) for seed in range(batch)])
    return list(stream_chunks(model, texts, frames, HEIGHT, WIDTH, **{**STEPS, **settings}))


def video(*arguments: Any, **settings: Any) -> Tensor:
    return torch.cat(chunks_of(*arguments, **settings), dim=2)


@pytest.mark.parametrize("steps", [None, (1000, 500), (999, 998, 3), (1000,)], ids=str)
@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
def test_levels_begin_at_the_strength_and_fall_whatever_it_is(steps: Any, shift: float) -> None:
    whole = sampling_times(7, shift, steps)
    for strength in [*torch.linspace(0.003, 0.999, 250).tolist(), 1e-4, 1 / 3, 0.57, 6 / 7, 0.9999999]:
        times = sampling_times(7, shift, steps, strength)
        assert float(times[0]) == pytest.approx(float(shift_time(torch.tensor(strength), shift)))
        assert len(times) >= 2 and times[-1] == 0 and bool((times.diff() < 0).all())
        assert torch.equal(times[1:], whole[len(whole) - len(times) + 1 :])
    assert torch.equal(sampling_times(7, shift, steps, 1.0), whole)


@pytest.mark.parametrize("steps", [4, 5, 10, 50])
def test_where_the_strength_is_a_step_it_is_the_one_of_diffusers(steps: int) -> None:
    """`WanVideoToVideoPipeline` skips the first steps and adds noise at the level of the next one."""
    for kept in range(1, steps + 1):
        expected = sampling_times(steps, 5.0)[steps - kept :]
        torch.testing.assert_close(sampling_times(steps, 5.0, strength=kept / steps), expected, rtol=0, atol=1e-6)


def test_few_steps_are_shifted_behind_the_strength() -> None:
    times = Schedule.of(8, 5.0, FEW, (1000, 900, 400), strength=0.5)
    torch.testing.assert_close(times.times, torch.tensor([5 / 6, 0.625, 0.0]))
    torch.testing.assert_close(times.opening, shift_time(torch.tensor([0.5, 0.4, 0.0]), 5.0))
    assert Schedule.of(8, 5.0, FEW, sampler="renoise", context_noise=0.1, strength=0.5).draws(0) == 3


@pytest.mark.parametrize("settings", [{}, {"sampler": "renoise", "denoising_steps": FEW, "context_noise": 0.1}])
@pytest.mark.parametrize("converted", [False, True])
def test_at_1_nothing_of_the_source_is_seen(converted: bool, settings: dict[str, Any]) -> None:
    model = pico.dense_model()
    if converted:
        model = pico.convert(model, **pico.VARIANTS[6])
    expected = video(model, 8, guidance_scale=2.0, **settings)
    source = clean(8)
    source[:, :, 3] = torch.nan
    assert torch.equal(video(model, source=source, strength=1.0, guidance_scale=2.0, **settings), expected)
    assert torch.equal(video(model, source=asked_for(source), strength=1, guidance_scale=2.0, **settings), expected)


@torch.no_grad()
def restyled(model: Any, source: Tensor, strength: float, steps: int) -> Tensor:
    """One prompt with a source of whole chunks, in Euler steps with shift 3."""
    levels = [strength, *[i / steps for i in range(steps, 0, -1) if i / steps < strength], 0.0]
    times = [3 * level / (1 + 2 * level) for level in levels]
    generator, cache, made = torch.Generator().manual_seed(0), model.init_cache(1, HEIGHT, WIDTH), []
    text = prompt(0).unsqueeze(0)
    for first, stop in model.causal.chunks(source.shape[2]):
        given = source[:, :, first:stop]
        x = add_noise(given, torch.randn(given.shape, generator=generator), torch.tensor([times[0]]))
        for t, below in itertools.pairwise(times):
            x = x + (below - t) * model.forward_chunk(x, torch.tensor([1000 * t]), text, cache)
        model.forward_chunk(x, torch.zeros(1), text, cache, write=True)
        made.append(x)
    return torch.cat(made, dim=2)


@pytest.mark.parametrize("family", ["anyflow_far", "skyreels_v2"])
def test_other_families_restyle(family: str) -> None:
    model = pico.dense_model(family=family, causal={"num_frames_per_block": 2, "window_frames": 7})
    found = video(model, source=clean(5), strength=0.5, num_inference_steps=4)
    assert found.shape[2] == 5 and bool(found.isfinite().all())
    assert not torch.equal(found, video(model, 5, num_inference_steps=4))


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.8])
def test_a_chunk_begins_as_the_source_under_noise_and_is_cached_restyled(strength: float) -> None:
    model, source = pico.dense_model(), clean(9)
    found = video(model, source=source, strength=strength, num_inference_steps=4)
    # Observed: 1.2e-7.
    assert pico.relative_error(found, restyled(model, source, strength, 4)) < FLOAT32


def test_the_weaker_the_nearer() -> None:
    model, source = pico.dense_model(), clean(9)
    far = [
        float((video(model, source=source, strength=s, num_inference_steps=8) - source).norm()) for s in (0.1, 0.5, 0.9)
    ]
    assert far[0] < far[1] < far[2]


def test_a_source_is_asked_once_a_chunk_and_says_where_the_video_ends() -> None:
    model = pico.dense_model()
    borders = model.causal.chunks(20)
    whole = chunks_of(model, source=clean(20))
    for length in (1, borders[0][1], borders[2][1], borders[2][1] + 1):
        asked: list[tuple[int, int]] = []
        found = chunks_of(model, source=asked_for(clean(20)[:, :, :length], asked))
        assert sum(x.shape[2] for x in found) == length
        assert asked == borders[: len(asked)]
        full = [x for x, (first, stop) in zip(found, borders, strict=False) if x.shape[2] == stop - first]
        assert all(torch.equal(a, b) for a, b in zip(full, whole, strict=False))
        assert torch.equal(torch.cat(found, dim=2), video(model, source=clean(20)[:, :, :length]))
        # A length that is asked for ends it before; one behind its end does not.
        assert video(model, 30, source=asked_for(clean(20)[:, :, :length])).shape[2] == length
    assert video(model, 5, source=asked_for(clean(20))).shape[2] == 5
    assert video(model, 5, source=clean(20)).shape[2] == 5


def test_a_source_is_read_no_further_than_the_rollout_has_come() -> None:
    model, asked = pico.dense_model(), []
    endless = itertools.count()

    def camera(first: int, stop: int) -> Tensor:
        asked.append(stop)
        return torch.cat([clean(1, seed=next(endless)) for _ in range(first, stop)], dim=2)

    rollout = stream_chunks(model, prompt(0).unsqueeze(0), None, HEIGHT, WIDTH, source=camera, **STEPS)
    for index in range(30):
        made = next(rollout)
        assert len(asked) == index + 1 and made.shape[2] == asked[-1] - (asked[-2] if index else 0)
    rollout.close()


def test_one_source_serves_every_item_and_two_serve_one_each() -> None:
    model, one, other = pico.dense_model(), clean(7, 1), clean(7, 2)
    shared = video(model, batch=2, source=one, seed=[1, 2])
    each = video(model, batch=2, source=torch.cat([one, other]), seed=[1, 2])
    assert torch.equal(shared[0], each[0]) and not torch.equal(shared[1], each[1])


def test_experts_share_the_steps_by_their_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    low, high = (pico.dense_model(seed=seed) for seed in (0, 1))
    low.noise_range, high.noise_range = (0.0, 0.875), (0.875, 1.0)
    asked: dict[str, list[float]] = {"low": [], "high": []}

    def watch(model: Any, name: str) -> None:
        run = model.forward_chunk

        def watched(x: Tensor, timestep: Tensor, *rest: Any, **more: Any) -> Tensor:
            asked[name].append(round(float(timestep[0])))
            return run(x, timestep, *rest, **more)

        monkeypatch.setattr(model, "forward_chunk", watched)

    watch(low, "low")
    watch(high, "high")
    stop = low.causal.chunk_end(low.causal.chunk_end(0))
    video([high, low], stop, source=clean(stop), strength=0.5, denoising_steps=FEW, shift=5.0)
    assert asked == {"low": [833, 625, 0, 833, 625], "high": [0]}


REFUSED = [
    ({"source": clean(4)[0]}, r"the source has shape \[2, 4, 6, 4\]; \[1, 2, F, 6, 4\] is expected"),
    ({"source": clean(4, batch=3)}, r"the source has shape \[3, 2, 4, 6, 4\]"),
    ({"source": asked_for(torch.zeros(1, 3, 9, 6, 4))}, r"\[1, 2, F, 6, 4\] is expected"),
    ({"source": lambda first, stop: clean(99)}, "the source returned 99 frames; at most . were requested"),
    ({"source": clean(0)}, "the source has no frames"),
    ({"source": asked_for(clean(0))}, "the source has no frames"),
    ({"source": clean(4), "start": clean(4)}, "a source already determines the first frames; give source or start"),
    ({"source": clean(4), "strength": 0.0}, "the strength must be above 0 and at most 1, not 0"),
    ({"source": clean(4), "strength": 1.1}, "not 1.1"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_is_no_source_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        chunks_of(pico.dense_model(), **settings)


def test_a_source_leads_no_further_than_the_rotary_table(caplog: Any) -> None:
    causal = {"num_frames_per_block": 2, "window_frames": 5, "sink_frames": 1, "sink_positions": "absolute"}
    model = pico.dense_model(causal=causal, rope_max_seq_len=9)
    assert video(model, source=asked_for(clean(20))).shape[2] == 8
    assert "the video ends after 8 latent frames" in caplog.text
    caplog.clear()
    assert video(model, source=asked_for(clean(5))).shape[2] == 5
    assert not caplog.text
    with pytest.raises(UsageError, match="20 latent frames are more than"):
        video(model, source=clean(20))


Frames = Callable[[Tensor], Tensor | FramesAt]


@pytest.mark.parametrize("given", [lambda x: x[0], asked_for], ids=["tensor", "function"])
@pytest.mark.parametrize(
    "settings", [{}, {"sampler": "renoise", "denoising_steps": FEW, "first_chunk_steps": (1000, 400)}]
)
@pytest.mark.parametrize("lanes_per_pass", [None, 1])
def test_streams_of_mixed_strengths_are_what_they_are_alone(
    given: Frames, settings: dict[str, Any], lanes_per_pass: int | None
) -> None:
    model = pico.convert(pico.dense_model(), **pico.VARIANTS[0])
    batch = batch_of(model, 6, lanes_per_pass=lanes_per_pass, **settings)
    joins: list[dict[str, Any]] = [
        {"num_frames": 9},
        {"source": clean(9, 1), "strength": 0.4},
        {"source": clean(8, 2), "strength": 0.4, "guidance_scale": 2.0},
        {"source": clean(7, 3), "strength": 0.9},
        {"source": clean(6, 4), "strength": 1.0},
    ]
    made: dict[int, list[Tensor]] = {}
    for index, join in enumerate(joins):
        more = {**join, **({"source": given(join["source"])} if "source" in join else {})}
        batch.join(prompt(index), seed=index, **more)
    for chunk in batch.chunks():
        made.setdefault(chunk.stream, []).append(chunk.latents)
    for index, join in enumerate(joins):
        expected = alone(model, prompt(index), join.get("num_frames"), index, **settings, **without_frames(join))
        found = torch.cat(made[index], dim=1)
        assert found.shape == expected.shape
        error = pico.relative_error(found, expected)
        assert error == 0 if lanes_per_pass == 1 else error < FLOAT32
    assert sorted(batch.pool.free) == list(range(6))


def without_frames(join: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in join.items() if key != "num_frames"}


def test_a_stream_ends_with_its_source_and_a_failed_round_asks_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = pico.dense_model(), []
    stop = model.causal.chunk_end(model.causal.chunk_end(0))
    source = clean(stop)
    batch = batch_of(model, 2)
    number = batch.join(prompt(0), source=asked_for(source, asked), strength=0.5)
    expected = alone(model, prompt(0), None, source=source, strength=0.5)
    passes = Rounds._chunks

    def fails(self: Any, streams: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(Rounds, "_chunks", fails)
    for _ in range(2):
        with pytest.raises(MemoryError):
            batch.step()
    assert len(asked) == 1
    monkeypatch.setattr(Rounds, "_chunks", passes)
    chunks = list(batch.chunks())
    assert torch.equal(torch.cat([x.latents for x in chunks], dim=1), expected)
    # The source ends with a chunk: that is known when the next one is asked for.
    assert [(x.stream, x.latents.shape[1] > 0, x.last) for x in chunks] == [
        (number, True, False),
        (number, True, False),
        (number, False, True),
    ]
    assert len(asked) == 3 and not batch.active and sorted(batch.pool.free) == [0, 1]


def test_a_batch_refuses_what_a_rollout_does() -> None:
    batch = batch_of(pico.dense_model(), 2)
    for settings, message in (
        ({"source": clean(4)}, "is expected"),
        ({"source": clean(4)[0], "start": clean(4)[0]}, "give source or start, not both"),
        ({"source": clean(4)[0], "strength": 2.0}, "at most 1, not 2"),
    ):
        with pytest.raises(UsageError, match=message):
            batch.join(prompt(0), **settings)
    assert not batch.active and not batch.waiting
