"""Rollouts whose passes are recorded once and replayed, as in a CUDA graph but on the CPU.

A tape of dispatched torch operations stands in for the graph. As in a graph, no Python is run again,
and values that were computed from Python numbers do not change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import image_case
import mla_attention
import pico
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mla_convert.mla import graph, kernels
from mla_convert.mla.fused import PATHS
from mla_convert.mla.graph import GraphedChunk, why_not_graph
from mla_convert.mla.pool import CachePool
from mla_convert.run.stream import stream_chunks

FRAMES, HEIGHT, WIDTH = 10, 6, 4
REFUSAL = mla_attention.why_not("cpu", torch.float32)
needs_interpreter = pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))


class Tape(TorchDispatchMode):
    """A `CUDARecorder` of dispatched operations: a replay runs them again on the same memory."""

    captures = 0

    def __init__(self, beside: Any = None) -> None:
        super().__init__()
        self.beside = beside
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, out))
        return out

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        Tape.captures += 1
        run()
        with self:
            out = run()
        return out.fill_(float("nan"))

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, kept in self.steps:
                for old, new in zip(tree_leaves(kept), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def rolled_out(model: Any, **settings: Any) -> Tensor:
    _, _, text = pico.inputs(1, 1, HEIGHT, WIDTH)
    return torch.cat(list(stream_chunks(model, text, FRAMES, HEIGHT, WIDTH, num_inference_steps=2, **settings)), dim=2)


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "why_not_graph", lambda model, cache: None)
    monkeypatch.setattr(graph, "CUDARecorder", lambda device, beside: Tape(beside))
    monkeypatch.setattr(Tape, "captures", 0)


@pytest.mark.usefixtures("taped")
@pytest.mark.parametrize("variant", [None, *pico.VARIANTS[::2]], ids=lambda v: "dense" if v is None else v["position"])
def test_replayed_passes_are_those_that_are_run(
    variant: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ring, sinks and positions advance between replays, also with guidance. Shapes that occur once are run eagerly."""
    model = pico.dense_model() if variant is None else pico.convert(pico.dense_model(), **variant)
    actual = rolled_out(model, guidance_scale=2.0)
    captures = Tape.captures
    monkeypatch.setattr(graph, "why_not_graph", lambda model, cache: "off")
    assert torch.equal(actual, rolled_out(model, guidance_scale=2.0))
    # Chunks of 2 frames, a window of 5: histories of 0, 2 and, from then on, 3 frames.
    assert captures == 1 < len(model.causal.chunks(FRAMES))


@pytest.mark.usefixtures("taped")
def test_a_video_of_five_seconds_replays_nothing() -> None:
    """Wan's 21 latent frames are 7 chunks, and only the last one sees a whole window of 21 frames."""
    model = pico.dense_model(layers=1, causal={"num_frames_per_block": 3, "window_frames": 21})
    text, captures = pico.inputs(1, 1, 4, 4)[2], []
    for frames in (21, 24):
        list(stream_chunks(model, text, frames, 4, 4, num_inference_steps=1))
        captures.append(Tape.captures)
    assert captures == [0, 1]


@pytest.mark.usefixtures("taped")
def test_a_window_that_is_written_again_is_captured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewinding allocates new memory for the places."""
    model = pico.convert(pico.dense_model(), position="rotate_on_read", kv_lora_rank=20)
    settings = {"prompt_at": {8: torch.ones(1, 3, 8)}.get, "recache": True}
    actual = rolled_out(model, **settings)
    monkeypatch.setattr(graph, "why_not_graph", lambda model, cache: "off")
    assert torch.equal(actual, rolled_out(model, **settings))


@pytest.mark.usefixtures("taped")
def test_a_compiled_model_is_captured_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico.dense_model()
    expected, writes = rolled_out(model), []

    def compiled(*arguments: Any, **more: Any) -> Any:
        writes.append(more["write"])
        return model._call_impl(*arguments, **more)

    # Where `model.compile` puts what a call runs.
    monkeypatch.setattr(model, "_compiled_call_impl", compiled)
    assert torch.equal(rolled_out(model), expected)
    # Of five chunks three are run, with two passes each; one warms up and one is captured. The last is not written.
    assert writes.count(True) == 4 and writes.count(False) == 3 * 2 + 2


@needs_interpreter
@pytest.mark.usefixtures("taped")
@pytest.mark.parametrize("history", ["chunk", "pass"])
def test_kernels_are_replayed(history: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept histories need two graphs: one pass expands them, the others reuse them."""
    model = pico.convert(pico.dense_model(layers=1), position="rotate_on_read", kv_lora_rank=14)
    model.set_kernels("triton", history)
    actual = rolled_out(model)
    captures = Tape.captures
    monkeypatch.setattr(graph, "why_not_graph", lambda model, cache: "off")
    assert torch.equal(actual, rolled_out(model))
    assert captures == (2 if history == "chunk" else 1)


@needs_interpreter
@pytest.mark.parametrize("failing", [0, 1])
def test_a_capture_that_fails_leaves_passes_to_the_model(
    failing: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first or the second of two graphs fails after histories were marked as expanded: only a warning results."""
    tapes: list[Tape] = []

    class Failing(Tape):
        def capture(self, run: Callable[[], Tensor]) -> Tensor:
            tapes.append(self)
            if len(tapes) <= failing:
                return super().capture(run)

            def nothing(layer: Any, hidden_states: Tensor, step: Any) -> Tensor:
                step.cache.expanded.filled([layer.layer], step.chunk)
                return hidden_states

            try:
                # A capture has computed nothing.
                model.kernels.attention = nothing
                run()
                raise RuntimeError("operation not permitted when stream is capturing")
            except RuntimeError:
                raise RuntimeError("operation failed due to a previous error during capture") from None
            finally:
                del model.kernels.attention

    model = pico.convert(pico.dense_model(layers=1), position="rotate_on_read", kv_lora_rank=14)
    model.set_kernels("triton", "chunk")
    expected = rolled_out(model)
    monkeypatch.setattr(graph, "why_not_graph", lambda model, cache: None)
    monkeypatch.setattr(graph, "CUDARecorder", lambda device, beside: Failing(beside))
    assert torch.equal(rolled_out(model), expected)
    assert len(tapes) == failing + 1 and tapes[0].beside is None
    # The second graph was to share the first one's memory.
    assert not failing or tapes[1].beside is tapes[0]
    (record,) = [record for record in caplog.records if "CUDA graphs" in record.message]
    assert record.levelname == "WARNING" and record.message == (
        "CUDA graphs: a capture failed, so all later passes run without a graph: "
        "operation not permitted when stream is capturing"
    )


def test_what_cannot_be_captured_says_why() -> None:
    model = pico.dense_model()
    cache = model.init_cache(1, HEIGHT, WIDTH)
    assert why_not_graph(model, cache) == "CUDA graphs need a CUDA device, but the model is on cpu"

    class OnCUDA:
        device, training, kernels = torch.device("cuda:0"), False, None

        def named_modules(self) -> Any:
            return model.named_modules()

    there: Any = OnCUDA()
    assert why_not_graph(there, cache) == "CUDA graphs are off"
    there.kernels = kernels.Kernels("torch")
    assert why_not_graph(there, cache) == "the cache is on another device than the model"
    assert why_not_graph(there, object()) == "object is not a ring of frames"
    view = CachePool([cache]).view(0, [0], [0], 2)
    assert why_not_graph(there, view) == "a LaneView serves one chunk only"
    there.training = True
    assert why_not_graph(there, cache) == "the model is in training mode"


class NoHost(TorchDispatchMode):
    """Refuses operations that make the host wait for a device or copy between the two; `meta` stands for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        assert name not in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "unique"), name
        out = func(*args, **(kwargs or {}))
        assert name != "cat" or not out.is_complex(), "the rotations of a window are copied"
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor) and x.dim()}
        assert devices <= {"meta"}, f"{name} touches {sorted(devices)}"
        return out


@pytest.mark.parametrize("mode", ["torch", *PATHS])
@pytest.mark.parametrize("own_chunk", ["exact", "latent"])
@pytest.mark.parametrize("position", ["decoupled", "derived", "rotate_on_read"])
def test_a_pass_neither_waits_nor_copies(
    position: str, own_chunk: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A steady-state pass on the meta device, with torch and with each path of the kernels."""
    if (mode, position) in (("absorbed", "derived"), ("absorbed", "rotate_on_read")):
        pytest.skip("not absorbable")
    variant = next(v for v in pico.VARIANTS if (v["position"], v["own_chunk"]) == (position, own_chunk))
    model = pico.convert(pico.dense_model(layers=1), **variant, key_mean=False).to("meta")
    latents, timestep, text = (x.to("meta") for x in pico.inputs(1, 2, HEIGHT, WIDTH))
    chosen = model.set_kernels("torch" if mode == "torch" else "triton", "pass")
    monkeypatch.setattr(mla_attention, "why_not", lambda *_: None)
    monkeypatch.setattr(kernels, "choose", lambda *_: kernels.Choice(mode, {}))
    cache = model.init_cache(1, HEIGHT, WIDTH, device="meta")
    cache.frames_seen = 8
    with torch.no_grad():
        model.forward_chunk(latents, timestep, text, cache)
        with NoHost():
            model.forward_chunk(latents, timestep, text, cache)
    assert mode == "torch" or chosen.found.choices


@pytest.mark.usefixtures("taped")
def test_conditions_are_copied_into_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conditions of kind `frames` differ in every chunk; a different shape needs a different graph."""
    model, text = image_case.model("wan2.1"), image_case.text("wan2.1")
    given = image_case.conditions("wan2.1", FRAMES)
    size = (image_case.HEIGHT, image_case.WIDTH)

    def made() -> Tensor:
        chunks = stream_chunks(model, text, FRAMES, *size, num_inference_steps=2, guidance_scale=2.0, conditions=given)
        return torch.cat(list(chunks), dim=2)

    actual, captures = made(), Tape.captures
    assert captures == 1
    cache = model.init_cache(1, *size)
    passes, x, t = GraphedChunk(model, cache), torch.ones(1, 4, 2, *size), torch.ones(1)
    for first, stop in model.causal.chunks(FRAMES):
        told = {**given, "image_latents": given["image_latents"][:, :, first:stop]}
        for tokens in (5, 7) if first == 8 else (5, 5):
            told["encoder_hidden_states_image"] = torch.full((1, tokens, 8), 0.1 * first)
            expected = model.forward_chunk(x, t, text, cache, **told)
            assert torch.equal(passes(x, t, text, **told), expected)
        model.forward_chunk(x, t, text, cache, write=True, **told)
    monkeypatch.setattr(graph, "why_not_graph", lambda model, cache: "off")
    assert torch.equal(actual, made())
