"""A new prompt that rewrites the cached window: what is cached afterwards, and the videos that follow."""

from __future__ import annotations

from typing import Any

import mla_attention
import pico
import pytest
import torch
from stream_case import FLOAT32, HEIGHT, STEPS, VARIANTS, WIDTH, alone, batch_of, no_memory_for, prompt
from torch import Tensor

from mla_convert.errors import UsageError
from mla_convert.mla.pool import CachePool
from mla_convert.run.stream import stream_chunks

CHUNK = 2
SINKLESS = {"num_frames_per_block": CHUNK, "window_frames": 6, "sink_frames": 0}
GUIDED = {"guidance_scale": 2.0}
OLD, NEW = prompt(0), prompt(1)
REFUSAL = mla_attention.why_not("cpu", torch.float32)
needs_interpreter = pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))


def model_of(variant: dict[str, Any] | None, causal: dict[str, Any], **changes: Any) -> Any:
    dense = pico.dense_model(causal=causal, **changes)
    return dense if variant is None else pico.convert(dense, **variant)


def switched(model: Any, frames: int, at: int, recache: bool = True, **settings: Any) -> Tensor:
    """A rollout `[C, F, H, W]` whose prompt changes with the chunk that begins at frame `at`."""
    later = {at: NEW.unsqueeze(0)}
    return alone(model, OLD, frames, prompt_at=later.get, recache=recache, **settings)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("settings", [{}, GUIDED, {"context_noise": 0.1}])
def test_while_the_window_fills_it_is_a_video_that_began_with_the_new_prompt(
    variant: dict[str, Any] | None, settings: dict[str, Any]
) -> None:
    """Bit by bit: the earlier chunks act as a given start, written with the new prompt."""
    model = model_of(variant, SINKLESS)
    found = switched(model, 10, at=4, **settings)
    assert torch.equal(found[:, :4], alone(model, OLD, 4, **settings))
    start = found[:, :4].unsqueeze(0)
    assert torch.equal(found, alone(model, NEW, 10, start=start, **settings))
    assert not torch.equal(found, switched(model, 10, at=4, recache=False, **settings))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("positions", ["window", "absolute"])
def test_once_the_window_has_moved_on_earlier_frames_are_forgotten(
    variant: dict[str, Any] | None, positions: str
) -> None:
    """The window's chunks are written as if the video had begun with them; observed 1.5e-7."""
    model = model_of(variant, {**SINKLESS, "sink_positions": positions})
    at, frames, kept = 10, 16, 6
    found = switched(model, frames, at)
    # The noise of the chunks that this video leaves out is drawn first.
    generator = torch.Generator().manual_seed(0)
    for _ in range((at - kept) // CHUNK):
        torch.randn((1, 2, CHUNK, HEIGHT, WIDTH), generator=generator)
    start = found[:, at - kept : at].unsqueeze(0)
    wanted = alone(model, NEW, frames - at + kept, seed=generator, start=start)
    assert pico.relative_error(found[:, at:], wanted[:, kept:]) < FLOAT32


@pytest.mark.parametrize("variant", VARIANTS)
def test_sinks_stay_and_the_rest_is_new(variant: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    causal = {"num_frames_per_block": CHUNK, "window_frames": 8, "sink_frames": 2}
    model, caches = model_of(variant, causal), []
    make = model.make_cache
    monkeypatch.setattr(model, "make_cache", lambda *args: caches.append(make(*args)) or caches[-1])
    for recache in (False, True):
        # One chunk follows the change; as the last one it is not written.
        switched(model, 12, at=10, recache=recache)
    (kept, rewritten), sinks = [[rows for rows in cache.rows if rows.shape[-1]] for cache in caches], slice(0, 2)
    slots = [model.causal.slot(frame) for frame in range(6, 10)]
    for before, after in zip(kept, rewritten, strict=True):
        assert torch.equal(before[:, sinks], after[:, sinks])
    assert any(not torch.equal(a[:, slots], b[:, slots]) for a, b in zip(kept, rewritten, strict=True))
    assert all(cache.frames_seen == 10 for cache in caches)


def test_chunks_of_sinks_are_not_written_again() -> None:
    """The first chunk contains a sink, so none of it is rewritten; the next chunk is."""
    model, passes = model_of(None, {**SINKLESS, "sink_frames": 1}), []
    forward = model.forward_chunk

    def counted(hidden_states: Tensor, *args: Any, write: bool = False, **more: Any) -> Tensor:
        passes.append((args[2].frames_seen, write))
        return forward(hidden_states, *args, write=write, **more)

    model.forward_chunk = counted
    switched(model, 6, at=4)
    steps = [(first, False) for first in (0, 0)], [(first, False) for first in (2, 2)], [(4, False)] * 2
    assert passes == [*steps[0], (0, True), *steps[1], (2, True), (2, True), *steps[2]]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("causal", [pico.WINDOW, SINKLESS])
@pytest.mark.parametrize("settings", [{}, GUIDED])
def test_a_stream_of_a_batch_does_the_same(
    variant: dict[str, Any] | None, causal: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Beside a stream of another age, which keeps its prompt and its cache; observed 2.2e-7."""
    model = model_of(variant, causal)
    batch = batch_of(model, 4, recache=True)
    neighbor = batch.join(prompt(5), seed=5, num_frames=14)
    made: dict[int, list[Tensor]] = {neighbor: [chunk.latents for chunk in batch.step()]}
    changed = batch.join(OLD, seed=0, num_frames=12, **settings)
    made[changed] = []
    while batch.active:
        if sum(part.shape[1] for part in made[changed]) == 8:
            batch.change_prompt(changed, NEW)
        for chunk in batch.step():
            made[chunk.stream].append(chunk.latents)
    assert pico.relative_error(torch.cat(made[changed], 1), switched(model, 12, at=8, **settings)) < FLOAT32
    assert pico.relative_error(torch.cat(made[neighbor], 1), alone(model, prompt(5), 14, seed=5)) < FLOAT32


def test_a_round_that_fails_on_the_way_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(pico.LAYOUTS[3], SINKLESS)
    batch = batch_of(model, 1, recache=True)
    stream = batch.join(OLD, num_frames=12)
    made = [chunk.latents for _ in range(4) for chunk in batch.step()]
    batch.change_prompt(stream, NEW)
    forward, calls = model.forward_chunk, []

    def failing(*args: Any, **more: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return forward(*args, **more)

    monkeypatch.setattr(model, "forward_chunk", failing)
    with pytest.raises(torch.OutOfMemoryError):
        batch.step()
    made += [chunk.latents for chunk in batch.chunks()]
    assert torch.equal(torch.cat(made, 1), switched(model, 12, at=8))


@needs_interpreter
@pytest.mark.parametrize("history", ["chunk", "pass"])
def test_kernels_expand_what_was_written_anew(history: str) -> None:
    model = model_of(pico.LAYOUTS[3], SINKLESS)
    wanted = switched(model, 10, at=6)
    model.set_kernels("triton", history=history)
    assert pico.relative_error(switched(model, 10, at=6), wanted) < FLOAT32


@pytest.mark.parametrize(
    ("window", "kept"), [({"window_frames": 6, "sink_frames": 1}, (3, 4)), ({"window_frames": 7}, (1, 2))]
)
def test_slots_that_a_failed_round_has_overwritten_are_not_read(
    window: dict[str, int], kept: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One stream has written its chunk when another runs out of memory; its prompt changes before the next try."""
    oldest: list[int | None] = []
    view = CachePool.view

    def noted(pool: CachePool, *args: Any) -> Any:
        oldest.extend(args[4:])
        return view(pool, *args)

    monkeypatch.setattr(CachePool, "view", noted)
    model = model_of(None, {"num_frames_per_block": CHUNK, **window})
    for fails, expected in zip((False, True), kept, strict=True):
        batch = batch_of(model, 2, recache=True)
        first = batch.join(OLD, seed=1, num_frames=14)
        for _ in range(4):
            batch.step()
        batch.join(prompt(3, tokens=4), seed=2, num_frames=14)
        if fails:
            with no_memory_for(model, tokens=4), pytest.raises(torch.OutOfMemoryError):
                batch.step()
        batch.change_prompt(first, NEW)
        oldest.clear()
        batch.step()
        assert {frame for frame in oldest if frame is not None} == {expected}
        list(batch.chunks())


def test_experts_write_each_their_window() -> None:
    high, low = (model_of(pico.LAYOUTS[3], SINKLESS, seed=seed) for seed in (0, 1))
    high.noise_range, low.noise_range = (0.5, 1.0), (0.0, 0.5)
    found = switched([high, low], 10, at=4)
    assert torch.equal(found, alone([high, low], NEW, 10, start=found[:, :4].unsqueeze(0)))


def test_a_cache_that_is_no_ring_is_refused_at_once() -> None:
    model = pico.dense_model(family="anyflow_far", causal=None)
    text = prompt(0).unsqueeze(0)
    with pytest.raises(UsageError, match="cannot be written again for a new prompt"):
        next(stream_chunks(model, text, 6, HEIGHT, WIDTH, recache=True, **STEPS))


def test_an_expert_writes_the_whole_window_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offloaded weights are moved to the device once, not for every chunk."""
    experts = [pico.dense_model(causal=SINKLESS, seed=seed) for seed in (0, 1)]
    experts[0].noise_range, experts[1].noise_range = (0.7, 1.0), (0.0, 0.7)
    passes: list[tuple[int, int]] = []
    for index, model in enumerate(experts):

        def noted(x: Tensor, *args: Any, index: int = index, forward: Any = model.forward_chunk, **more: Any) -> Tensor:
            if more["write"]:
                passes.append((index, len(x)))
            out: Tensor = forward(x, *args, **more)
            return out

        monkeypatch.setattr(model, "forward_chunk", noted)
    switched(experts, 8, at=6)
    # Three chunks of both experts, then the window of three: no more changes than writers need.
    order = [index for index, _ in passes]
    assert len(order) == 2 * 3 + 2 * 3
    assert order[6:12] in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0])
    passes.clear()
    batch = batch_of(experts, 1, recache=True)
    stream = batch.join(OLD, num_frames=8)
    for _ in range(3):
        batch.step()
    batch.change_prompt(stream, NEW)
    passes.clear()
    batch.step()
    assert [index for index, _ in passes][:6] == [0, 0, 0, 1, 1, 1]


def test_each_rewritten_chunk_is_prepared_for_the_expert_that_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    views: list[int] = []
    view = CachePool.view

    def noted(pool: CachePool, expert: int, *args: Any) -> Any:
        views.append(expert)
        return view(pool, expert, *args)

    monkeypatch.setattr(CachePool, "view", noted)
    high, low = (model_of(pico.LAYOUTS[3], SINKLESS, seed=seed) for seed in (0, 1))
    high.noise_range, low.noise_range = (0.5, 1.0), (0.0, 0.5)
    batch = batch_of([high, low], 1, recache=True)
    stream = batch.join(OLD, num_frames=3 * CHUNK)
    for _ in range(2):
        batch.step()
    batch.change_prompt(stream, NEW)
    views.clear()
    batch.step()
    # Two chunks of the window by each expert in turn, then the next chunk by both.
    assert views == [0, 0, 1, 1, 0, 1]
