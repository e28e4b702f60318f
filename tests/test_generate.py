"""Streaming generation: samplers, seeds, changing prompts, endless videos."""

from __future__ import annotations

import itertools
from typing import Any

import pico
import pytest
import torch
from torch import Tensor

from mla_convert.distill.rollout import self_rollout
from mla_convert.flow import denoising_times, sampling_times
from mla_convert.run.stream import stream_chunks

STEPS = (1000, 750, 500, 250)
SIZE = (6, 4)
FLOAT32 = 1e-5


def text(batch: int = 2, seed: int = 1) -> Tensor:
    return pico.inputs(batch, 1, *SIZE, seed)[2]


def stream(model: Any, prompts: Tensor, frames: int | None = 7, **settings: Any) -> Any:
    return stream_chunks(model, prompts, frames, *SIZE, **{"num_inference_steps": 2, **settings})


def video(*arguments: Any, **settings: Any) -> Tensor:
    return torch.cat(list(stream(*arguments, **settings)), dim=2)


@torch.no_grad()
def few_step_loop(model: Any, prompts: Tensor, frames: int, shift: float, opening: Any, steps: Any) -> Tensor:
    """Sampling as published with Self-Forcing: predict the clean chunk, then add new noise at the next level.

    The first chunk takes the steps `opening`, as Causal-Forcing's few-step students do.
    """
    generator, made = torch.Generator().manual_seed(0), []
    cache = model.init_cache(len(prompts), *SIZE)
    for first, stop in model.causal.chunks(frames):
        shape = (len(prompts), 2, stop - first, *SIZE)
        noisy = torch.randn(shape, generator=generator)
        levels = [shift * s / 1000 / (1 + (shift - 1) * s / 1000) for s in (steps if first else opening)]
        for index, sigma in enumerate(levels):
            flow = model.forward_chunk(noisy, torch.full((len(prompts),), 1000 * sigma), prompts, cache)
            clean = noisy - sigma * flow
            if index < len(levels) - 1:
                below = levels[index + 1]
                noisy = (1 - below) * clean + below * torch.randn(shape, generator=generator)
        model.forward_chunk(clean, torch.zeros(len(prompts)), prompts, cache, write=True)
        made.append(clean)
    return torch.cat(made, dim=2)


@pytest.mark.parametrize("converted", [False, True])
def test_new_noise_between_steps_is_the_published_loop(converted: bool) -> None:
    model = pico.dense_model()
    if converted:
        model = pico.convert(model, **pico.VARIANTS[6])
    found = video(model, text(), shift=5.0, sampler="renoise", denoising_steps=STEPS)
    # Observed: 1.7e-7.
    assert pico.relative_error(found, few_step_loop(model, text(), 7, 5.0, STEPS, STEPS)) < FLOAT32
    assert pico.relative_error(found, video(model, text(), shift=5.0, denoising_steps=STEPS)) > 0.1


def test_the_first_chunk_may_take_other_steps() -> None:
    model = pico.dense_model()
    settings = {"shift": 5.0, "sampler": "renoise", "denoising_steps": (1000, 500), "first_chunk_steps": STEPS}
    found = video(model, text(), **settings)
    # Observed: 1.1e-7.
    assert pico.relative_error(found, few_step_loop(model, text(), 7, 5.0, STEPS, (1000, 500))) < FLOAT32
    (_, stop), *_ = model.causal.chunks(7)
    assert torch.equal(found, video(model, text(), start=found[:, :, :stop], **settings))


def test_even_steps_and_denoising_steps_are_the_same_times() -> None:
    torch.testing.assert_close(denoising_times(STEPS, 5.0), sampling_times(4, 5.0))
    model = pico.dense_model()
    even = video(model, text(), num_inference_steps=4, shift=5.0)
    assert pico.relative_error(video(model, text(), denoising_steps=STEPS, shift=5.0), even) < FLOAT32


def test_one_step_knows_no_sampler() -> None:
    model = pico.dense_model()
    given = {"num_inference_steps": 1}
    assert torch.equal(video(model, text(), sampler="renoise", **given), video(model, text(), **given))


@pytest.mark.parametrize("context_noise", [0.0, 0.2])
def test_training_rolls_out_as_renoise_does(context_noise: float) -> None:
    model = pico.dense_model()
    settings = {"sampler": "renoise", "context_noise": context_noise}
    expected = video(model, text(), denoising_steps=STEPS, shift=5.0, **settings)
    generator, times = torch.Generator().manual_seed(0), denoising_times(STEPS, 5.0)
    made = self_rollout(model, text(), (7, *SIZE), times, len(STEPS) - 1, generator, **settings)
    # Observed: 0.
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-6)


def test_a_flow_map_is_asked_down_to_0_before_new_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico.dense_model(family="anyflow_far", causal={"num_frames_per_block": 2, "window_frames": 7})
    pass_, asked = model.forward_chunk, []

    def watched(x: Tensor, *rest: Any, r_timestep: Tensor, **more: Any) -> Tensor:
        asked.append(float(r_timestep[0]))
        return pass_(x, *rest, r_timestep=r_timestep, **more)

    monkeypatch.setattr(model, "forward_chunk", watched)
    video(model, text(), 4, sampler="renoise")
    # Two steps of each chunk, and the pass that writes the first.
    assert asked == [0.0] * 5
    asked.clear()
    video(model, text(), 4)
    assert asked == [500.0, 0.0, 0.0, 500.0, 0.0]


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 3.0, "sampler": "renoise", "context_noise": 0.1}])
def test_an_item_of_a_batch_is_its_single_rollout(settings: dict[str, Any]) -> None:
    """Matrix products of a different shape round differently: observed at most 7e-7, for values up to 3.4."""
    model, prompts, seeds = pico.convert(pico.dense_model(), **pico.VARIANTS[6]), text(3), [3, 1, 4]
    batch = video(model, prompts, seed=seeds, **settings)
    for item, seed in enumerate(seeds):
        alone = video(model, prompts[item : item + 1], seed=seed, **settings)
        assert pico.relative_error(batch[item : item + 1], alone) < FLOAT32
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    assert torch.equal(video(model, prompts, seed=generators, **settings), batch)
    with pytest.raises(ValueError, match="2 seeds do not fit a batch of 3"):
        next(stream(model, prompts, seed=[1, 2]))


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("family", ["wan", "anyflow_far", "skyreels_v2"])
def test_another_prompt_changes_what_comes_after_it_alone(family: str, guidance_scale: float) -> None:
    model = pico.dense_model(family=family, causal={"num_frames_per_block": 2, "window_frames": 7})
    settings = {"guidance_scale": guidance_scale}
    before = list(stream(model, text(), 10, **settings))
    asked = []

    def prompt_at(frame: int) -> Tensor | None:
        asked.append(frame)
        return text(1, seed=9) if frame == 4 else None

    after = list(stream(model, text(), 10, prompt_at=prompt_at, **settings))
    assert asked == [0, 2, 4, 6, 8]
    assert all(torch.equal(a, b) for a, b in zip(after[:2], before[:2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(after[2:], before[2:], strict=True))


def test_text_that_is_not_there_from_the_start_is_not_needed() -> None:
    """The cache holds no text, so after all prompts change, a rollout continues as if made with the new ones."""
    model = pico.dense_model()
    changed = video(model, text(), prompt_at=lambda frame: text(seed=9) if frame == 0 else None)
    assert torch.equal(changed, video(model, text(seed=9)))


@pytest.mark.parametrize("first", [False, True])
def test_a_rollout_without_an_end_begins_like_one_with_an_end(first: bool) -> None:
    model = pico.dense_model(causal={**pico.WINDOW, "independent_first_frame": first})
    ended = list(stream(model, text(), 9 if first else 8))
    endless = list(itertools.islice(stream(model, text(), None), len(ended)))
    assert all(torch.equal(a, b) for a, b in zip(endless, ended, strict=True))
    ranges = list(itertools.islice(model.causal.chunk_ranges(None), 40))
    assert ranges == model.causal.chunks(ranges[-1][1])


def test_two_thousand_chunks_take_no_more_memory_than_ten() -> None:
    """The cache stays the first chunk's, and no temporal index leaves the window."""
    model = pico.dense_model(layers=1, causal={"num_frames_per_block": 1, "window_frames": 3, "sink_frames": 1})
    caches, indices, make, rotations = [], set(), model.init_cache, type(model.rotary_table()).rotations

    def kept(*given: Any, **more: Any) -> Any:
        caches.append(make(*given, **more))
        return caches[-1]

    def watched(table: Any, frames: list[int], height: int, width: int) -> Tensor:
        indices.update(frames)
        return rotations(table, frames, height, width)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "init_cache", kept)
        patch.setattr(type(model.rotary_table()), "rotations", watched)
        chunks = stream_chunks(model, text(1), None, 2, 2, num_inference_steps=1)
        for _ in range(10):
            next(chunks)
        (cache,) = caches
        places, held = [rows.data_ptr() for rows in cache.rows], cache.bytes()
        for _ in range(1990):
            last = next(chunks)
    assert torch.isfinite(last).all()
    assert cache.frames_seen >= 1999
    assert [rows.data_ptr() for rows in cache.rows] == places and cache.bytes() == held
    assert indices == {0, 1, 2}


def test_a_step_is_told_and_may_change_the_chunk() -> None:
    model, told = pico.dense_model(), []

    def on_step(first: int, index: int, t: float, x: Tensor) -> Tensor | None:
        told.append((first, index, t))
        return torch.zeros_like(x) if index == 1 else None

    chunks = list(stream(model, text(), 4, on_step=on_step))
    assert told == [(0, 0, 1.0), (0, 1, 0.5), (2, 0, 1.0), (2, 1, 0.5)]
    assert all(not chunk.any() for chunk in chunks)
