"""Parity with the attention that Self-Forcing publishes (arXiv 2506.08009, section 3.3 and algorithm 1).

The reference is written from the paper in plain torch: a chunk attends, without a mask, to the cached
keys and values of the frames in its window and to its own; keys are rotated by the absolute index of
their frame. The window moves along, and the first frames may be pinned in it as sinks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pico
import pytest
import torch
from test_invariants import stock_copy
from torch import Tensor

from mla_convert.flow import add_noise, sampling_times
from mla_convert.mla.attention import stream_pass
from mla_convert.run.stream import stream_chunks

# Absolute, for values of up to 1.1 and 4.4; the largest error seen on a CPU stands beside each.
LAYER = 2e-6  # 4.2e-7
ROLLOUT = 4e-6  # 4.8e-7

ABSOLUTE = {"sink_positions": "absolute"}
WINDOWS = [
    {"num_frames_per_block": 3, "window_frames": 21, **ABSOLUTE},
    {"num_frames_per_block": 3, "window_frames": 6, **ABSOLUTE},
    {"num_frames_per_block": 1, "window_frames": 4, "sink_frames": 1, **ABSOLUTE},
    {"num_frames_per_block": 3, "window_frames": 9, "sink_frames": 3, **ABSOLUTE},
    {"num_frames_per_block": 3, "window_frames": 7, "independent_first_frame": True, **ABSOLUTE},
    # Without sinks only differences of positions count, so that indices within the window do as well.
    {"num_frames_per_block": 2, "window_frames": 5},
]
HEIGHT, WIDTH, ROWS, COLUMNS = 6, 4, 3, 2


def rope(x: Tensor, first_frame: int) -> Tensor:
    """Rotate `[B, F, T, H, D]` by absolute frame, row and column; Wan's split of the channels."""
    side = 2 * (x.shape[-1] // 6)
    frames = torch.arange(first_frame, first_frame + x.shape[1])
    places = torch.cartesian_prod(frames, torch.arange(ROWS), torch.arange(COLUMNS)).double()
    angles = [
        places[:, axis, None] * 10000.0 ** (-torch.arange(0, size, 2).double() / size)
        for axis, size in enumerate((x.shape[-1] - 2 * side, side, side))
    ]
    turns = torch.polar(torch.ones(()).double(), torch.cat(angles, dim=1)).view(1, x.shape[1], -1, 1, x.shape[-1] // 2)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2).to(x)


class SelfForcing:
    """Self-attention of one layer with its rolling cache, one entry per frame; a processor of stock Wan."""

    def __init__(self, window: int, sinks: int) -> None:
        self.window, self.sinks, self.write = window, sinks, False
        self.cache: list[tuple[Tensor, Tensor]] = []

    def __call__(self, attn: Any, x: Tensor, *unused: Any) -> Tensor:
        query, key, value = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
        q, k, v = (
            part.unflatten(-1, (attn.heads, -1)).unflatten(1, (-1, ROWS * COLUMNS)) for part in (query, key, value)
        )
        start = len(self.cache)
        stop, q, k = start + q.shape[1], rope(q, start), rope(k, start)
        seen = [f for f in range(start) if f < self.sinks or f >= stop - (self.window - self.sinks)]
        own = list(zip(k.unbind(1), v.unbind(1), strict=True))
        keys, values = (torch.cat(parts, dim=1) for parts in zip(*(self.cache[f] for f in seen), *own, strict=True))
        logits = torch.einsum("bqhd,bkhd->bhqk", q.flatten(1, 2), keys) / q.shape[-1] ** 0.5
        if self.write:
            self.cache.extend(own)
        return attn.to_out[0](torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), values).flatten(2))


def reference_model(dense: Any) -> tuple[Any, Callable[[bool], None]]:
    """Stock Wan with the reference attention in every layer, and the processors that turn writing on and off."""
    stock, causal = stock_copy(dense), dense.causal
    layers = [SelfForcing(causal.window_frames, causal.sink_frames) for _ in stock.blocks]
    for block, layer in zip(stock.blocks, layers, strict=True):
        block.attn1.set_processor(layer)

    def write(on: bool) -> None:
        for layer in layers:
            layer.write = on

    return stock, write


@torch.no_grad()
def reference_rollout(dense: Any, text: Tensor, frames: int, steps: int, context_noise: float) -> Tensor:
    """Algorithm 1: denoise a chunk against the cache, then write it with one more pass."""
    stock, write = reference_model(dense)
    generator, chunks = torch.Generator().manual_seed(0), []
    for start, stop in dense.causal.chunks(frames):
        x = torch.randn(len(text), 2, stop - start, HEIGHT, WIDTH, generator=generator)
        for t, t_next in itertools.pairwise(sampling_times(steps, 3.0)):
            x = x + (t_next - t) * stock(x, (1000 * t).expand(len(text)), text).sample
        chunks.append(x)
        context = torch.full((len(text),), context_noise)
        if context_noise > 0:
            x = add_noise(x, torch.randn(x.shape, generator=generator), context)
        write(True)
        stock(x, 1000 * context, text)
        write(False)
    return torch.cat(chunks, dim=2)


@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: "-".join(map(str, w.values())))
def test_one_layer(window: dict[str, Any], record_property: Callable[[str, Any], None]) -> None:
    dense = pico.dense_model(heads=3, causal=window)
    causal, ours = dense.causal, dense.blocks[0].attn1
    reference, processor = stock_copy(dense).blocks[0].attn1, SelfForcing(causal.window_frames, causal.sink_frames)
    processor.write = True
    cache = dense.init_cache(2, HEIGHT, WIDTH)
    hidden, tokens = torch.randn(2, 14 * ROWS * COLUMNS, 36), ROWS * COLUMNS
    worst = 0.0
    for start, stop in causal.chunks(14):
        x = hidden[:, start * tokens : stop * tokens]
        step = stream_pass(dense.rotary_table, cache, stop - start, write=True)
        actual, expected = ours(x, None, None, step.of(ours, x)), processor(reference, x)
        cache.frames_seen = stop
        worst = max(worst, float((actual - expected).detach().abs().max()))
    record_property("max_abs_error", worst)
    print(f"one layer, {window}: {worst:.1e} of {LAYER:.0e}")
    assert worst < LAYER


@pytest.mark.parametrize("context_noise", [0.0, 0.1])
@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: "-".join(map(str, w.values())))
@pytest.mark.parametrize("converted", [False, True], ids=["dense", "full-rank"])
def test_a_rollout(
    converted: bool, window: dict[str, Any], context_noise: float, record_property: Callable[[str, Any], None]
) -> None:
    dense = pico.dense_model(causal=window)
    model = pico.convert(dense, **pico.lossless(2, 12, "exact")[0]) if converted else dense
    _, _, text = pico.inputs(2, 1, HEIGHT, WIDTH)
    settings = {"num_inference_steps": 2, "shift": 3.0, "context_noise": context_noise}
    actual = torch.cat(list(stream_chunks(model, text, 13, HEIGHT, WIDTH, **settings)), dim=2)
    expected = reference_rollout(dense, text, 13, 2, context_noise)
    error = float((actual - expected).abs().max())
    record_property("max_abs_error", error)
    print(f"rollout, {window}: {error:.1e} of {ROLLOUT:.0e}")
    assert error < ROLLOUT


def test_sinks_within_the_window_are_elsewhere_in_time() -> None:
    """With sinks, re-indexing by the window gives a different model, hence `sink_positions`."""
    window = {"num_frames_per_block": 1, "window_frames": 4, "sink_frames": 1}
    dense = pico.dense_model(causal=window)
    _, _, text = pico.inputs(2, 1, HEIGHT, WIDTH)
    chunks = list(stream_chunks(dense, text, 8, HEIGHT, WIDTH, num_inference_steps=2, shift=3.0))
    expected = reference_rollout(dense, text, 8, 2, 0.0)
    assert float((torch.cat(chunks[:4], dim=2) - expected[:, :, :4]).abs().max()) < ROLLOUT
    assert float((chunks[-1] - expected[:, :, -1:]).abs().max()) > 1e-3
