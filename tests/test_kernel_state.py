"""What kernels read from a model and write to its cache: adapters, hooks, failures, slots of chunks not kept."""

from __future__ import annotations

from typing import Any

import mla_attention
import pico
import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from mla_convert.errors import UserError
from mla_convert.mla import fused, kernels
from mla_convert.mla.cache import FrameCache

REFUSAL = mla_attention.why_not("cpu", torch.float32)
pytestmark = pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))
# Observed 4e-7.
FLOAT32 = 5e-6
HEIGHT, WIDTH, CHUNK = 6, 4, 2


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `auto` use kernels on a CPU, too."""
    monkeypatch.setattr(kernels, "left_to_torch", lambda shape: None)


def converted(window: int = 6, **variant: Any) -> Any:
    causal = {"num_frames_per_block": CHUNK, "window_frames": window}
    return pico.convert(pico.dense_model(layers=1, causal=causal), **variant)


def chunk(model: Any, cache: FrameCache, index: int, write: bool = False) -> Tensor:
    """A pass over the next chunk of video `index`."""
    latents, timestep, text = pico.inputs(1, CHUNK, HEIGHT, WIDTH, seed=index)
    with torch.no_grad():
        out: Tensor = model.forward_chunk(latents, timestep, text, cache, write=write)
    return out


def after(model: Any, mode: str, chunks: int = 2, history: Any = "auto") -> FrameCache:
    """A cache to which some chunks were written; the model continues in `mode`."""
    model.set_kernels(mode, history)
    cache: FrameCache = model.init_cache(1, HEIGHT, WIDTH)
    for index in range(chunks):
        chunk(model, cache, index, write=True)
    return cache


@pytest.mark.parametrize("variant", [pico.VARIANTS[0], {"position": "rotate_on_read", "kv_lora_rank": 20}])
def test_a_lora_on_what_kernels_read_is_left_to_torch(variant: dict[str, Any]) -> None:
    """Starting with the first pass after it is loaded, and only while it is loaded."""
    model = converted(**variant)
    cache = after(model, "auto")
    plain = chunk(model, cache, 5)
    assert set(model.kernels.report()["paths"]) != {"torch"}
    model.add_adapter(LoraConfig(r=2, target_modules=["kv_b_proj"], init_lora_weights=False))
    with_lora = chunk(model, cache, 5)
    model.set_kernels("torch")
    assert torch.equal(with_lora, chunk(model, cache, 5))
    assert pico.relative_error(with_lora, plain) > 1e-3
    model.set_kernels("triton")
    with pytest.raises(UserError, match="kv_b_proj has an adapter, a hook or a wrapped forward; merge or remove it"):
        chunk(model, cache, 5)
    model.delete_adapters("default")
    model.set_kernels("auto")
    # Peft leaves its wrapper, which does nothing now.
    assert pico.relative_error(chunk(model, cache, 5), plain) < FLOAT32


def test_hooks_of_projections_are_called() -> None:
    model = converted(position="rotate_on_read", kv_lora_rank=20)
    cache = after(model, "triton")
    values, called = model.blocks[0].attn1.to_v, []
    values.register_forward_hook(lambda module, given, out: called.append(module) or 2 * out)
    actual = chunk(model, cache, 5)
    assert called == [values]
    model.set_kernels("torch")
    assert pico.relative_error(actual, chunk(model, cache, 5)) < FLOAT32


def test_a_history_that_was_not_expanded_is_expanded_by_the_next_try(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted(position="rotate_on_read", kv_lora_rank=20)
    cache = after(model, "triton", history="chunk")

    def too_large(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(fused._FusedPass, "_expand", too_large)
        with pytest.raises(torch.OutOfMemoryError):
            chunk(model, cache, 5)
    actual = chunk(model, cache, 5)
    model.set_kernels("torch")
    assert pico.relative_error(actual, chunk(model, cache, 5)) < FLOAT32


@pytest.mark.parametrize("own_chunk", ["latent", "exact"])
def test_going_back_over_a_chunk_that_was_only_denoised(own_chunk: str) -> None:
    """Where kernels read the own chunk from the cache, it occupies the slots of the window's oldest frames."""
    model = converted(position="rotate_on_read", kv_lora_rank=20, own_chunk=own_chunk)
    cache = after(model, "triton", chunks=3)
    chunk(model, cache, 5)
    cache.rewind(4)
    assert cache.oldest == (2 if own_chunk == "latent" else 0)
    actual = chunk(model, cache, 6)
    expected = after(model, "torch", chunks=3)
    expected.rewind(4)
    expected.oldest = cache.oldest
    assert pico.relative_error(actual, chunk(model, expected, 6)) < FLOAT32


def test_a_layer_is_looked_at_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules are searched for adapters and hooks, which takes as long as a launch."""
    searched: list[Any] = []
    found = kernels.changed_module
    monkeypatch.setattr(kernels, "changed_module", lambda layer: searched.append(layer) or found(layer))
    model = converted(**pico.VARIANTS[0])
    after(model, "triton", chunks=1)
    assert searched == [model.blocks[0].attn1]


@pytest.mark.parametrize("write", [False, True])
def test_a_cache_that_kernels_cannot_read_is_named(write: bool, caplog: pytest.LogCaptureFixture) -> None:
    """AnyFlow-FAR's two histories are no ring: an error where kernels are asked for, one line where they are not."""
    causal = {"num_frames_per_block": CHUNK, "window_frames": 9}
    model = pico.convert(pico.dense_model(layers=1, family="anyflow_far", causal=causal), **pico.VARIANTS[0])
    model.set_kernels("triton")
    with pytest.raises(UserError, match=r"layer 0 \(FarCache is not a ring of frames\); set kernels: auto"):
        chunk(model, model.init_cache(1, HEIGHT, WIDTH), 0, write)
    caplog.set_level("INFO", "mla_convert")
    cache, chosen = model.init_cache(1, HEIGHT, WIDTH), model.set_kernels("auto")
    for index in range(2):
        chunk(model, cache, index, write)
        chosen.announce()
    assert caplog.messages == ["kernels: auto: 1 x torch; not taken: FarCache is not a ring of frames"]


def test_the_own_chunk_is_asked_about_too() -> None:
    """Its dense values are too wide for `attend`, while the latents are not too wide to be absorbed."""
    causal = {"num_frames_per_block": CHUNK, "window_frames": 6}
    model = pico.convert(
        pico.dense_model(layers=1, heads=1, head_dim=132, causal=causal), key_mean=False, **pico.VARIANTS[0]
    )
    model.set_kernels("triton")
    with pytest.raises(UserError, match="132 value channels per head; supported: 1 to 128"):
        chunk(model, model.init_cache(1, HEIGHT, WIDTH), 0)
