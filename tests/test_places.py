"""The places of a chunk: computed once, shared by its passes, and at a fixed address where a graph needs that."""

from __future__ import annotations

from typing import Any

import pico
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mla_convert.families.far import denoise_pass
from mla_convert.mla import cache as cache_module
from mla_convert.mla.places import PlacesMemo
from mla_convert.mla.pool import CachePool
from mla_convert.mla.rope import RotaryTable

FRAMES, HEIGHT, WIDTH = 13, 6, 4


def test_passes_of_a_chunk_share_their_places_and_chunks_do_not() -> None:
    model = pico.dense_model()
    cache, table = model.init_cache(1, HEIGHT, WIDTH), model.rotary_table
    first = cache.places.next(table, cache, 2)
    assert cache.places.next(table, cache, 2) is first
    cache.frames_seen = 2
    second = cache.places.next(table, cache, 2)
    assert second is not first and second.history_slots.tolist() == [0, 1] and second.own_slots.tolist() == [2, 3]
    cache.reset()
    assert cache.places.next(table, cache, 2).own_slots.tolist() == [0, 1]


def test_passes_of_a_chunk_share_their_places_behind_coarse_history() -> None:
    causal = {"num_frames_per_block": 2, "window_frames": 13}
    model = pico.dense_model(family="anyflow_far", causal=causal)
    cache, (latents, timestep, text) = model.init_cache(1, 8, 12), pico.inputs(1, 2, 8, 12)
    first = denoise_pass(cache, 2).places
    assert denoise_pass(cache, 2).places is first
    with torch.no_grad():
        model.forward_chunk(latents, timestep, text, cache, write=True)
    second = denoise_pass(cache, 2).places
    assert second is not first and len(second.history_slots) == 2 * cache.grid.full_tokens
    assert denoise_pass(cache, 2).places is second
    cache.reset()
    assert not len(denoise_pass(cache, 2).places.history_slots)


def test_slots_are_those_of_the_frames() -> None:
    model = pico.dense_model()
    cache = model.init_cache(1, HEIGHT, WIDTH)
    cache.frames_seen = 11
    places = cache.places.next(model.rotary_table, cache, 2)
    assert places.history_slots.tolist() == [model.causal.slot(frame) for frame in model.causal.history(11, 13)]
    assert places.own_slots.tolist() == [model.causal.slot(frame) for frame in (11, 12)]


def test_fixed_places_stay_where_they_are_and_hold_what_new_ones_would() -> None:
    model = pico.dense_model()
    table = model.rotary_table
    fixed, free = (model.init_cache(1, HEIGHT, WIDTH) for _ in range(2))
    fixed.places.fixed = True
    addresses = set()
    for start, stop in model.causal.chunks(FRAMES)[:-1]:
        fixed.frames_seen = free.frames_seen = start
        kept, new = (cache.places.next(table, cache, stop - start) for cache in (fixed, free))
        for name in ("rotations", "grid", "slots", "own_slots", "history_slots", "own_rotations"):
            assert torch.equal(getattr(kept, name), getattr(new, name))
        if len(new.history_slots) == 3:
            addresses.add(kept.history_rotations.data_ptr())
    assert len(addresses) == 1


class Sent(TorchDispatchMode):
    """Counts the tensors that are copied to a device; `meta` stands for one."""

    tensors = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.tensors += func is torch.ops.aten._to_copy.default and args[0].device != out.device
        return out


@pytest.mark.parametrize("pooled", [False, True])
def test_chunks_of_the_steady_state_send_only_their_slots_to_the_device(pooled: bool) -> None:
    model = pico.dense_model(layers=1).to("meta")
    cache = model.init_cache(1, HEIGHT, WIDTH, device="meta")
    sent, made = [], []

    def rotary_table() -> RotaryTable:
        made.append(cache.frames_seen)
        return model.rotary_table()

    for start, stop in model.causal.chunks(FRAMES)[:-1]:
        cache.frames_seen = start
        used = CachePool([cache]).view(0, [0], [start], stop - start) if pooled else cache
        with Sent() as seen:
            used.places.next(rotary_table, used, stop - start)
        sent.append(seen.tensors)
    # The window of 5 frames is full from the third chunk on.
    assert sent[0] > sent[3] and sent[3:] == [1] * len(sent[3:])
    assert made[-1] == model.causal.chunks(FRAMES)[2][0]


def test_rotations_of_another_place_are_not_those_of_the_last_one() -> None:
    model = pico.dense_model(causal={"num_frames_per_block": 2, "window_frames": 4, "sink_positions": "absolute"})
    kept = model.init_cache(1, HEIGHT, WIDTH)
    kept.places.fixed = True
    for start in (0, 2, 4, 6):
        new = model.init_cache(1, HEIGHT, WIDTH)
        kept.frames_seen = new.frames_seen = start
        # The history of a chunk is the chunk before it.
        actual, expected = (cache.places.next(model.rotary_table, cache, 2) for cache in (kept, new))
        assert torch.equal(actual.own_rotations, expected.own_rotations)
        assert torch.equal(actual.history_rotations, expected.history_rotations)


def test_a_gradient_survives_the_places_of_later_chunks() -> None:
    model = pico.dense_model().requires_grad_(True)
    latents, timestep, text = pico.inputs(1, 6, HEIGHT, WIDTH)
    cache = model.init_cache(1, HEIGHT, WIDTH)
    total = torch.zeros(())
    for start, stop in model.causal.chunks(6):
        chunk = (latents[:, :, start:stop], timestep[:, start:stop], text, cache)
        total = total + model.forward_chunk(*chunk).square().mean()
        with torch.no_grad():
            model.forward_chunk(*chunk, write=True)
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


class FixedPlaces(PlacesMemo):
    def __init__(self) -> None:
        super().__init__()
        self.fixed = True


def test_a_rollout_reads_the_same_rows_with_fixed_places(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico.convert(pico.dense_model(), position="decoupled", kv_lora_rank=14, qk_rope_head_dim=6)
    clip = pico.inputs(2, FRAMES, HEIGHT, WIDTH)
    with torch.no_grad():
        expected, _ = pico.stream(model, *clip)
        monkeypatch.setattr(cache_module, "PlacesMemo", FixedPlaces)
        actual, _ = pico.stream(model, *clip)
    assert torch.equal(actual, expected)
