"""`auto` compares the rows that kernels write with torch's, also where no output depends on them."""

from __future__ import annotations

from typing import Any

import mla_attention
import pico
import pytest
import torch
from mla_attention.ring import ring_index
from stream_case import batch_of, prompt
from torch import Tensor

from mla_convert.mla import kernels
from mla_convert.mla.cache import FrameCache
from mla_convert.mla.kernels import Kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REFUSAL = mla_attention.why_not(DEVICE, torch.float32)
pytestmark = pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))
HEIGHT, WIDTH = 6, 4
CACHES = ["auto", "int8", ((6, 8), (14, 4))]
# Observed 2e-7; a latent in fewer bits may round to the next step.
LARGEST = {"auto": 5e-6, "int8": 1e-3, ((6, 8), (14, 4)): 1e-3}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `auto` use kernels on a CPU and, on a GPU, in float32, too."""
    monkeypatch.setattr(kernels, "left_to_torch", lambda shape: None)


@pytest.fixture
def reversed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that writes every row backwards."""
    right = mla_attention.latent_write_

    def wrong(rows: Tensor, scales: Tensor | None, slots: Tensor, key: Tensor, *rest: Any) -> None:
        right(rows, scales, slots, key, *rest)
        place = ring_index(rows, slots, len(key))
        rows[place] = rows[place].flip(-1)

    monkeypatch.setattr(mla_attention, "latent_write_", wrong)


def converted(cache: Any, variant: dict[str, Any] = pico.VARIANTS[0]) -> Any:
    causal = {"num_frames_per_block": 2, "window_frames": 4}
    dense = pico.dense_model(heads=1, layers=variant.get("layers_per_latent", 1), causal=causal)
    model = pico.convert(dense, **variant, key_mean=False).to(DEVICE)
    model.set_cache(cache)
    return model


def rollout(model: Any, mode: str) -> tuple[Tensor, FrameCache, Kernels]:
    """Three chunks, each in a pass that reads and one that writes."""
    chosen = model.set_kernels(mode)
    cache = model.init_cache(1, HEIGHT, WIDTH)
    latents, timestep, text = (x.to(DEVICE) for x in pico.inputs(1, 6, HEIGHT, WIDTH))
    out = []
    with torch.no_grad():
        for start, stop in model.causal.chunks(6):
            given = latents[:, :, start:stop], timestep[:, start:stop], text
            out += [model.forward_chunk(*given, cache, write=write) for write in (False, True)]
    return torch.cat(out, dim=2), cache, chosen


def streams(model: Any, mode: str) -> tuple[list[Tensor], Kernels]:
    """Two streams of a pool that share their passes, in lanes that are not the first."""
    chosen = model.set_kernels(mode)
    batch, made = batch_of(model, 3, num_inference_steps=1), {}
    gone = batch.join(prompt(9))
    for number in range(2):
        batch.join(prompt(number), seed=number, num_frames=6)
    batch.leave(gone)
    while batch.active:
        for chunk in batch.step():
            made.setdefault(chunk.stream, []).append(chunk.latents)
    return [torch.cat(parts, dim=1) for parts in made.values()], chosen


def by_torch(chosen: Kernels) -> bool:
    report = chosen.report()
    return set(report["paths"]) >= {"torch"} and "the rows written differ from torch's by" in str(report["refused"])


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.usefixtures("reversed_rows")
def test_wrong_rows_are_noticed_and_replaced(cache: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = converted(cache)
    expected, kept, _ = rollout(model, "torch")
    actual, found, chosen = rollout(model, "auto")
    assert by_torch(chosen) and "torch attends in layer 0 from now on: the rows written" in caplog.text
    # What precedes the layer is the same, so torch's rows are the same to the bit.
    (rows, scales, _), (own_rows, own_scales, _) = found.kept(0), kept.kept(0)
    assert torch.equal(rows, own_rows) and (scales is None or torch.equal(scales, own_scales))
    assert pico.relative_error(actual, expected) < LARGEST["auto"]


@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.usefixtures("reversed_rows")
def test_wrong_rows_in_a_pool_are_noticed_and_replaced(cache: Any) -> None:
    model = converted(cache)
    expected, _ = streams(model, "torch")
    actual, chosen = streams(model, "auto")
    assert by_torch(chosen)
    for one, right in zip(actual, expected, strict=True):
        assert pico.relative_error(one, right) < LARGEST[cache]


@pytest.mark.parametrize("cache", CACHES, ids=str)
def test_right_rows_are_compared_once_and_kept(cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted(cache)
    expected, _, _ = rollout(model, "torch")
    layer = model.blocks[0].attn1
    compared, eager = [], layer.eager_attention
    monkeypatch.setattr(layer, "eager_attention", lambda x, step: compared.append(step.write) or eager(x, step))
    actual, _, chosen = rollout(model, "auto")
    assert "torch" not in chosen.report()["paths"]
    # Without and with history.
    assert compared == [False, True, False, True]
    assert pico.relative_error(actual, expected) < LARGEST[cache]


def test_rows_that_torch_writes_or_an_output_shows_are_not_compared() -> None:
    for settings in ({"layers_per_latent": 2}, {"own_chunk": "latent"}):
        model = converted("auto", {"position": "rotate_on_read", "kv_lora_rank": 20, **settings})
        _, _, chosen = rollout(model, "auto")
        assert chosen.found.checked and not any(unread for *_, unread in chosen.found.checked)
