"""After 2,000 chunks, a rollout has the same memory, the same places and the same answer."""

from __future__ import annotations

from typing import Any

import pico
import pytest
import torch
from torch import Tensor

from mla_convert.mla.attention import stream_pass

HEIGHT, WIDTH = 2, 2
CHUNKS, MADE = 2000, 24


def probe(model: Any, cache: Any, text: Tensor) -> Tensor:
    """Velocity of a fixed noisy chunk that follows the cached frames."""
    noise = torch.randn(1, 2, 2, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(5))
    out: Tensor = model.forward_chunk(noise, torch.tensor([500.0]), text, cache)
    return out


@pytest.mark.parametrize("position", [None, "decoupled", "rotate_on_read"])
def test_the_same_window_gives_the_same_velocity_after_2000_chunks(position: str | None) -> None:
    """Bit by bit, wherever the window is in the ring by then. Only the first and last chunks are computed here;

    `docs/benchmarks/long_rollout.py` computes all of them.
    """
    model = pico.dense_model(layers=1)
    if position is not None:
        shared = {"qk_rope_head_dim": 6} if position == "decoupled" else {}
        model = pico.convert(model, position=position, kv_lora_rank=14, **shared)
    cache, text = model.init_cache(1, HEIGHT, WIDTH), pico.inputs(1, 1, HEIGHT, WIDTH)[2]
    generator = torch.Generator().manual_seed(0)
    memory, sizes = [rows.data_ptr() for rows in cache.rows], cache.bytes()
    with torch.no_grad():
        for number in (*range(1, MADE + 1), *range(CHUNKS - MADE + 1, CHUNKS + 1)):
            cache.frames_seen = 2 * (number - 1)
            x = torch.randn(1, 2, 2, HEIGHT, WIDTH, generator=generator)
            model.forward_chunk(x, torch.zeros(1), text, cache, write=True)
            if number == 20:
                window = [
                    cache.take(cache.kept(layer), cache.slots(history(model, cache)))
                    for layer in range(len(cache.rows))
                ]
                early = probe(model, cache, text)
                places = stream_pass(model.rotary_table, cache, 2, write=False).views[0]
        assert cache.frames_seen == 2 * CHUNKS
        late = stream_pass(model.rotary_table, cache, 2, write=False).views[0]
        assert torch.equal(late.own_rotations, places.own_rotations)
        assert torch.equal(late.history_rotations, places.history_rotations)
        # One frame further on the window has another place in the ring.
        for offset in (0, 1):
            cache.frames_seen = 2 * CHUNKS + offset
            for layer, rows in enumerate(window):
                cache.put(cache.kept(layer), cache.slots(history(model, cache)), rows)
            assert torch.equal(probe(model, cache, text), early)
    assert [rows.data_ptr() for rows in cache.rows] == memory and cache.bytes() == sizes


def history(model: Any, cache: Any) -> list[int]:
    """The frames that the next chunk sees."""
    frames: list[int] = model.causal.history(cache.frames_seen, cache.frames_seen + 2)
    return frames
