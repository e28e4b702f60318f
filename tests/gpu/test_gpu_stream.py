"""Whole models on a GPU: kernels against torch, and CUDA graphs against launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="models need diffusers")

import pico

from mla_convert.mla.graph import why_not_graph
from mla_convert.run.batch import StreamBatch
from mla_convert.run.stream import stream_chunks

FRAMES, HEIGHT, WIDTH = 12, 32, 32
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def model(variant: dict[str, Any] | None, dtype: torch.dtype) -> Any:
    dense = pico.dense_model(heads=3, head_dim=64)
    converted = dense if variant is None else pico.convert(dense, **variant)
    return converted.to("cuda", dtype)


def rolled_out(streaming: Any, mode: str, history: str = "auto", cuda_graph: bool = False) -> Tensor:
    streaming.set_kernels(mode, history, cuda_graph)
    _, _, text = pico.inputs(2, 1, HEIGHT, WIDTH)
    chunks = stream_chunks(streaming, text, FRAMES, HEIGHT, WIDTH, num_inference_steps=3, guidance_scale=2.0)
    return torch.cat(list(chunks), dim=2)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("variant", [None, *pico.VARIANTS], ids=str)
def test_kernels_equal_torch(variant: dict[str, Any] | None, dtype: torch.dtype) -> None:
    streaming = model(variant, dtype)
    expected, actual = rolled_out(streaming, "torch"), rolled_out(streaming, "triton")
    assert pico.relative_error(actual, expected) < TOLERANCE[dtype]
    assert "torch" not in streaming.kernels.report()["paths"]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("variant", [None, *pico.VARIANTS], ids=str)
def test_streams_that_share_passes(variant: dict[str, Any] | None, dtype: torch.dtype) -> None:
    streaming = model(variant, dtype)

    def streamed(mode: str) -> dict[int, Tensor]:
        streaming.set_kernels(mode)
        batch, made = StreamBatch(streaming, 4, HEIGHT, WIDTH, num_inference_steps=3), {}
        for seed in range(3):
            text = pico.inputs(1, 1, HEIGHT, WIDTH, seed)[2][0]
            batch.join(text, seed, FRAMES, guidance_scale=2.0 if seed == 0 else 1.0)
            for chunk in batch.step():
                made.setdefault(chunk.stream, []).append(chunk.latents)
        for chunk in batch.chunks():
            made[chunk.stream].append(chunk.latents)
        return {number: torch.cat(chunks, dim=1) for number, chunks in made.items()}

    expected, actual = streamed("torch"), streamed("triton")
    for number, latents in expected.items():
        assert pico.relative_error(actual[number], latents) < TOLERANCE[dtype]
    assert "torch" not in streaming.kernels.report()["paths"]


@pytest.mark.parametrize("history", ["pass", "chunk"])
@pytest.mark.parametrize("mode", ["torch", "triton", "auto"])
@pytest.mark.parametrize("variant", [None, *pico.VARIANTS[::2]], ids=str)
def test_graphs_equal_launches(variant: dict[str, Any] | None, mode: str, history: str) -> None:
    streaming = model(variant, torch.bfloat16)
    expected = rolled_out(streaming, mode, history)
    assert why_not_graph(streaming, streaming.init_cache(2, HEIGHT, WIDTH)) == "CUDA graphs are off"
    actual = rolled_out(streaming, mode, history, cuda_graph=True)
    assert why_not_graph(streaming, streaming.init_cache(2, HEIGHT, WIDTH)) is None
    # The same kernels in the same order; 0 is expected.
    assert pico.relative_error(actual, expected) < 1e-3


def test_a_pass_of_the_steady_state_does_not_wait() -> None:
    streaming = model(pico.VARIANTS[6], torch.bfloat16)
    streaming.set_kernels("triton", "pass")
    latents, timestep, text = (x.to("cuda") for x in pico.inputs(1, 2, HEIGHT, WIDTH))
    cache = streaming.init_cache(1, HEIGHT, WIDTH)
    cache.frames_seen = 8
    arguments = (latents.bfloat16(), timestep, text.bfloat16(), cache)
    with torch.no_grad():
        streaming.forward_chunk(*arguments)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            streaming.forward_chunk(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
