"""Conditions of a rollout: tensors or functions, with guidance, recaching and experts, alone or in a batch."""

from __future__ import annotations

import itertools
from typing import Any

import image_case as case
import pico
import pytest
import torch
from torch import Tensor

from mla_convert.errors import UsageError
from mla_convert.flow import next_sample, sampling_times
from mla_convert.run.batch import RoundError, StreamBatch
from mla_convert.run.stream import stream_chunks

SIZE = (case.HEIGHT, case.WIDTH)
STEPS = {"num_inference_steps": 2, "shift": 3.0}
# Relative to the largest magnitude; the largest errors seen on a CPU stand beside them.
BY_HAND = 2e-6  # 1.9e-7
IN_A_BATCH = 2e-6  # 1.4e-7


def rolled_out(model: Any, kind: str, frames: int = 9, batch: int = 1, **settings: Any) -> Tensor:
    given = {"conditions": case.conditions(kind, frames, batch), **settings}
    chunks = stream_chunks(model, case.text(kind, batch), frames, *SIZE, **{**STEPS, **given})
    return torch.cat(list(chunks), dim=2)


def by_hand(model: Any, kind: str, frames: int, guidance_scale: float) -> Tensor:
    """The rollout through the stock interface: channels beside the noise, and a separate pass for each prompt."""
    text, given = case.text(kind), case.conditions(kind, frames)
    image = given.pop("image_latents")
    generator, made = torch.Generator().manual_seed(0), []
    told = [(text, model.init_cache(1, *SIZE)), (torch.zeros_like(text), model.init_cache(1, *SIZE))]
    for first, stop in model.causal.chunks(frames):
        x = torch.randn(1, case.CHANNELS, stop - first, *SIZE, generator=generator)

        def run(x: Tensor, t: float, prompt: Tensor, cache: Any, write: bool, now: Tensor) -> Tensor:
            whole = torch.cat([x, now], dim=1)
            return model.forward_chunk(whole, torch.full((1,), 1000 * t), prompt, cache, write=write, **given)

        now = image[:, :, first:stop]
        for t, t_next in itertools.pairwise(sampling_times(2, 3.0)):
            v, away = (run(x, float(t), *one, False, now) for one in told)
            x = next_sample(x, away + guidance_scale * (v - away), t, t_next, None)
        for one in told:
            run(x, 0.0, *one, True, now)
        made.append(x)
    return torch.cat(made, dim=2)


@pytest.mark.parametrize("kind", case.KINDS)
@pytest.mark.parametrize("variant", [None, {}, {"own_chunk": "latent"}], ids=["dense", "exact", "latent"])
@torch.no_grad()
def test_every_pass_of_a_rollout_reads_its_conditions(kind: str, variant: dict[str, Any] | None) -> None:
    model = case.model(kind) if variant is None else case.converted(case.model(kind), **variant)
    expected = by_hand(model, kind, 9, 2.0)
    made = rolled_out(model, kind, guidance_scale=2.0)
    assert made.shape == (1, case.CHANNELS, 9, *SIZE)
    assert pico.relative_error(made, expected) < BY_HAND
    for name in case.conditions(kind):
        changed = case.conditions(kind, 9)
        changed[name] = changed[name] + 0.5
        assert pico.relative_error(rolled_out(model, kind, conditions=changed), expected) > 1e-3


def test_a_function_is_asked_once_a_chunk_and_may_go_on_for_ever() -> None:
    model, asked = case.model("wan2.2"), []
    image = case.conditions("wan2.2", 9, 2)["image_latents"]

    def image_at(first: int, stop: int) -> Tensor:
        asked.append((first, stop))
        return image[:, :, first:stop]

    expected = rolled_out(model, "wan2.2", batch=2)
    assert torch.equal(rolled_out(model, "wan2.2", batch=2, conditions={"image_latents": image_at}), expected)
    assert asked == model.causal.chunks(9)
    endless = stream_chunks(model, case.text("wan2.2", 2), None, *SIZE, conditions={"image_latents": image_at}, **STEPS)
    assert torch.equal(torch.cat([next(endless) for _ in range(4)], dim=2), expected[:, :, :8])
    # One image for every item of the batch.
    for item in (0, 1):
        alone = rolled_out(model, "wan2.2", batch=2, conditions={"image_latents": image[item : item + 1]})
        assert torch.equal(alone[item], expected[item]) and not torch.equal(alone[1 - item], expected[1 - item])


@pytest.mark.parametrize("kind", case.KINDS)
def test_given_frames_are_written_with_their_conditions(kind: str) -> None:
    model = case.converted(case.model(kind))
    whole = rolled_out(model, kind, context_noise=0.1)
    again = rolled_out(model, kind, context_noise=0.1, start=whole[:, :, :4])
    assert torch.equal(again, whole)


def test_a_window_is_written_again_with_the_conditions_of_its_frames() -> None:
    """While the window fills, a change with `recache` equals continuing a start with the new prompt."""
    model = case.model("wan2.2", causal={"num_frames_per_block": 2, "window_frames": 8})
    new = case.text("wan2.2", seed=9)
    changed = rolled_out(model, "wan2.2", 8, prompt_at={6: new}.get, recache=True)
    started = stream_chunks(
        model, new, 8, *SIZE, start=changed[:, :, :6], conditions=case.conditions("wan2.2", 8), **STEPS
    )
    assert torch.equal(torch.cat(list(started), dim=2), changed)
    kept = rolled_out(model, "wan2.2", 8, prompt_at={6: new}.get)
    assert torch.equal(kept[:, :, :6], changed[:, :, :6]) and not torch.equal(kept, changed)


def test_both_experts_are_told() -> None:
    low, high = case.model("wan2.2", seed=0), case.model("wan2.2", seed=1)
    low.noise_range, high.noise_range = (0.0, 0.8), (0.8, 1.0)
    two = rolled_out([high, low], "wan2.2")
    changed = case.conditions("wan2.2", 9)
    changed["image_latents"] = changed["image_latents"].clone()
    changed["image_latents"][:, :, 8:] += 1
    other = rolled_out([high, low], "wan2.2", conditions=changed)
    assert torch.equal(two[:, :, :8], other[:, :, :8]) and not torch.equal(two[:, :, 8:], other[:, :, 8:])
    low.noise_range = high.noise_range = (0.0, 1.0)
    assert not torch.equal(rolled_out(low, "wan2.2"), two)


@pytest.mark.parametrize("lanes_per_pass", [None, 1])
@pytest.mark.parametrize("kind", case.KINDS)
def test_streams_of_a_batch_have_images_of_their_own(kind: str, lanes_per_pass: int | None) -> None:
    model = case.converted(case.model(kind))
    batch = StreamBatch(model, 4, *SIZE, lanes_per_pass=lanes_per_pass, recache=True, **STEPS)
    made: dict[int, list[Tensor]] = {}
    expected: dict[int, Tensor] = {}
    frames = 11
    for seed in (1, 2, 3):
        given, guidance_scale = case.conditions(kind, frames, seed=seed), 2.0 if seed == 2 else 1.0
        lane: dict[str, Any] = dict(given)
        if seed == 3:
            image = given["image_latents"]
            lane["image_latents"] = lambda first, stop, image=image: image[:, :, first:stop]
        number = batch.join(case.text(kind, seed=seed)[0], seed, frames, guidance_scale, conditions=lane)
        changes = {6: case.text(kind, seed=20)}.get if seed == 1 else None
        chunks = stream_chunks(
            model,
            case.text(kind, seed=seed),
            frames,
            *SIZE,
            seed=seed,
            guidance_scale=guidance_scale,
            conditions=given,
            prompt_at=changes,
            recache=changes is not None,
            **STEPS,
        )
        expected[number] = torch.cat(list(chunks), dim=2)[0]
        for chunk in batch.step():
            made.setdefault(chunk.stream, []).append(chunk.latents)
        if len(made[0]) == 3:
            batch.change_prompt(0, case.text(kind, seed=20)[0])
    for chunk in batch.chunks():
        made[chunk.stream].append(chunk.latents)
    for number, whole in expected.items():
        assert pico.relative_error(torch.cat(made[number], dim=1), whole) < IN_A_BATCH


def test_a_round_that_fails_does_not_ask_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = case.model("wan2.2"), []

    def image_at(first: int, stop: int) -> Tensor:
        asked.append((first, stop))
        return torch.zeros(1, 8, stop - first, *SIZE)

    batch = StreamBatch(model, 1, *SIZE, **STEPS)
    batch.join(case.text("wan2.2")[0], conditions={"image_latents": image_at})
    batch.step()
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward_chunk", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("unlucky")))
        with pytest.raises(RoundError, match="a pass of stream 0 failed: RuntimeError: unlucky"):
            batch.step()
    (chunk,) = batch.step()
    assert chunk.first == 2 and asked == [(0, 2), (2, 4)]


@pytest.mark.parametrize(
    ("changes", "frames", "message"),
    [
        ({"image_latents": None}, 9, "conditioned on an image, but image_latents is missing; pass image= or"),
        ({"encoder_hidden_states_image": None}, 9, "but encoder_hidden_states_image is missing"),
        (
            {"motion": torch.zeros(1)},
            9,
            "CausalWanTransformer3DModel has no condition motion; its conditions: ",
        ),
        ({"image_latents": torch.zeros(1, 8, 7, *SIZE)}, 9, "image_latents has 7 frames, 9 are needed; give more"),
        ({"image_latents": torch.zeros(1, 8, 9, *SIZE)}, None, "9 frames, but the video has no end; give a function"),
        ({"image_latents": torch.zeros(1, 8, 9, 4, 4)}, 9, r"shape \[1, 8, 9, 4, 4\]; \[B, c, F, 4, 6\] is expected"),
        ({"image_latents": torch.zeros(3, 8, 9, *SIZE)}, 9, "its batch must be 2 or 1"),
        ({"encoder_hidden_states_image": lambda a, b: None}, 9, "give a tensor, not a function"),
        ({"image_latents": lambda a, b: torch.zeros(1, 8, 1, *SIZE)}, 9, "image_latents has 1 frames, 2 are needed"),
    ],
)
def test_conditions_that_do_not_fit_are_refused_before_anything_runs(
    changes: dict[str, Any], frames: int | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = case.model("wan2.1")
    monkeypatch.setattr(model, "forward_chunk", lambda *a, **k: pytest.fail("the model ran"))
    given = {**case.conditions("wan2.1", 9), **changes}
    given = {name: value for name, value in given.items() if value is not None}
    with pytest.raises(UsageError, match=message) as caught:
        next(stream_chunks(model, case.text("wan2.1", 2), frames, *SIZE, conditions=given))
    assert "\n" not in str(caught.value)


def test_a_stream_without_its_image_does_not_join() -> None:
    batch = StreamBatch(case.model("wan2.2"), 1, *SIZE)
    with pytest.raises(UsageError, match="image_latents is missing; pass image="):
        batch.join(case.text("wan2.2")[0])
    assert batch.active == [] and batch.pool.free


def test_a_model_without_conditions_takes_none() -> None:
    model = pico.dense_model(family="skyreels_v2", causal=None)
    with pytest.raises(UsageError, match="has no condition speed; its conditions: fps"):
        next(stream_chunks(model, torch.zeros(1, 3, 8), 5, *SIZE, conditions={"speed": torch.zeros(1)}))
    (first, *_), (second, *_) = (
        list(stream_chunks(model, torch.zeros(1, 3, 8), 5, *SIZE, conditions={"fps": torch.tensor([fps])}, **STEPS))
        for fps in (0, 1)
    )
    assert not torch.equal(first, second)
