"""torch.compile while a model streams: every call of a block is compiled, and recompilation stops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mla_attention
import pico
import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

from mla_convert.run.batch import StreamBatch
from mla_convert.run.stream import stream_chunks

LAYERS, HEIGHT, WIDTH = 12, 4, 4
# Chunks of 2 frames in a window of 5: the third fills it, the last one reads slots that have been written thrice.
FRAMES, FILLING = 14, 3
# Observed 0: a graph is run by the operations that it was traced from.
FLOAT32 = 1e-5
RANDOM = {"init": "random", "own_chunk": "exact"}
CASES: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "exact": {"position": "rotate_on_read", "kv_lora_rank": 20},
    "shared": {"position": "rotate_on_read", "kv_lora_rank": 20, "layers_per_latent": 2},
    "decoupled": {"position": "decoupled", "kv_lora_rank": 14, "qk_rope_head_dim": 6},
}


class Counting:
    """A backend that counts the graphs it compiles and their calls."""

    def __init__(self) -> None:
        self.compiled = self.calls = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.compiled += 1
        run = lookup_backend("aot_eager")(graph, inputs)

        def counted(*arguments: Any) -> Any:
            self.calls += 1
            return run(*arguments)

        return counted


@pytest.fixture
def backend() -> Iterator[Counting]:
    torch.compiler.reset()
    yield Counting()
    torch.compiler.reset()


def model_of(case: str, layers: int = LAYERS) -> Any:
    settings = CASES[case]
    dense = pico.dense_model(layers=layers)
    if settings is None:
        return dense
    model = pico.convert(dense, **RANDOM, **settings)
    if case == "decoupled":
        # As calibration leaves them: other pairs in every layer.
        for layer, block in enumerate(model.blocks):
            block.attn1.rope_index.copy_((block.attn1.rope_index + layer) % 6)
    return model


def streamed(
    model: Any, counts: Counting | None = None, cache_dtype: Any = None
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Velocities of a rollout with two passes per chunk and one that writes; per chunk, graphs called and compiled."""
    latents, timestep, text = pico.inputs(1, FRAMES, HEIGHT, WIDTH)
    cache, found, log = model.init_cache(1, HEIGHT, WIDTH, dtype=cache_dtype), [], []
    with torch.no_grad():
        for start, stop in model.causal.chunks(FRAMES):
            before = (0, 0) if counts is None else (counts.calls, counts.compiled)
            chunk, times = latents[:, :, start:stop], timestep[:, start:stop]
            for index, write in enumerate((False, False, True)):
                found.append(model(chunk + index, times, text, cache=cache, write=write))
            if counts is not None:
                log.append((counts.calls - before[0], counts.compiled - before[1]))
    return torch.cat(found, dim=2), log


@pytest.mark.parametrize("case", [*CASES, "int8", "mixed"])
def test_every_block_call_is_compiled_and_a_full_window_compiles_nothing(case: str, backend: Counting) -> None:
    model = model_of("exact" if case in ("int8", "mixed") else case)
    if case == "mixed":
        model.set_cache(((4, 8), (16, 4)))
    cache_dtype = torch.int8 if case == "int8" else None
    if case == "decoupled":
        # What a pipeline sets: on a CPU torch is the default, and a compiled block is not left to hear it.
        model.set_kernels("auto")
    expected, _ = streamed(model, cache_dtype=cache_dtype)
    model.compile_repeated_blocks(backend=backend, fullgraph=True)
    actual, log = streamed(model, backend, cache_dtype)
    assert pico.relative_error(actual, expected) < FLOAT32
    assert [calls for calls, _ in log] == [3 * LAYERS] * len(log)
    # Once a shape of history and once more for the pass that writes; a length that changes twice is left open.
    assert [compiled for _, compiled in log] == [2] * FILLING + [0] * (len(log) - FILLING)


def test_a_compiled_model_streams_in_one_graph_a_pass(backend: Counting) -> None:
    model = model_of("exact", layers=2)
    expected, _ = streamed(model)
    model.compile(backend=backend)
    actual, log = streamed(model, backend)
    assert pico.relative_error(actual, expected) < FLOAT32
    # The places of the next frames are computed before it.
    assert [calls for calls, _ in log] == [3] * len(log)
    assert all(compiled for _, compiled in log[:FILLING]) and not any(compiled for _, compiled in log[FILLING:])


def test_streams_that_share_passes_are_compiled(backend: Counting) -> None:
    """Their view of the pool is a new object in every chunk."""
    model, text = model_of("exact", layers=2), pico.inputs(1, 1, HEIGHT, WIDTH)[2]
    expected = torch.cat(list(stream_chunks(model, text, FRAMES, HEIGHT, WIDTH, num_inference_steps=2)), dim=2)
    model.compile_repeated_blocks(backend=backend, fullgraph=True)
    batch = StreamBatch(model, lanes=2, height=HEIGHT, width=WIDTH, num_inference_steps=2)
    for seed in (0, 1):
        batch.join(text[0], seed=seed, num_frames=FRAMES)
    found, compiled = [], []
    while batch.active:
        calls = backend.calls
        found.append(batch.step()[0].latents)
        compiled.append(backend.compiled)
        assert backend.calls - calls == 3 * 2
    assert pico.relative_error(torch.cat(found, dim=1), expected[0]) < FLOAT32
    assert compiled[FILLING - 1 :] == [compiled[-1]] * (len(compiled) - FILLING + 1)


@pytest.mark.skipif(reason := mla_attention.why_not("cpu", torch.float32), reason=str(reason))
@pytest.mark.parametrize("case", ["dense", "exact", "shared"])
def test_kernels_attend_between_the_graphs_of_a_block(case: str, backend: Counting) -> None:
    model = model_of(case, layers=2)
    chosen = model.set_kernels("triton", "chunk")
    expected, _ = streamed(model)
    model.compile_repeated_blocks(backend=backend)
    actual, log = streamed(model, backend)
    assert pico.relative_error(actual, expected) < FLOAT32
    assert chosen.report()["paths"] == {"expand, sdpa": 2}
    assert all(calls >= 3 * 2 for calls, _ in log)
    assert len({calls for calls, _ in log}) == 1 and not any(compiled for _, compiled in log[FILLING:])
