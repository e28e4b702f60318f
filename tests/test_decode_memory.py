"""The memory of decoding, counted before it runs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from pretend_gpu import GPU
from test_decode import VAES, latents, tiny_vae

from mla_convert.run.decode import StreamingDecoder
from mla_convert.run.decode_memory import VaeBytes, _Live, decoding_bytes, reserve

RESULTS = Path(__file__).parents[1] / "docs" / "benchmarks"


def held(vae: Any, items: int) -> VaeBytes:
    """The same, measured by decoding `items` videos on the CPU."""
    decoder, (*chunks, last) = StreamingDecoder(vae), latents(4, items).split(1, dim=2)
    for chunk in chunks:
        decoder(chunk)
    kept = sum(x.untyped_storage().nbytes() for x in decoder.kept())
    with _Live(decoder.kept()) as live:
        decoder(last)
    return VaeBytes(kept, live.peak - kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VAES)
def test_the_count_is_what_decoding_holds(name: str, dtype: torch.dtype) -> None:
    vae = torch.nn.Module.to(tiny_vae(name), dtype)
    counted, (kept, working) = decoding_bytes(vae, 2, 3), held(vae, 1)
    assert counted.kept == kept
    # Attention may take other temporaries on another device; observed: equal.
    assert working == pytest.approx(counted.working, rel=0.01)
    assert vae.dtype == dtype and vae.device.type == "cpu"


@pytest.mark.parametrize("name", VAES)
def test_more_videos_take_their_features_and_no_more(name: str) -> None:
    vae = tiny_vae(name)
    one, three = held(vae, 1), held(vae, 3)
    # The pixels of the others wait: four frames of 16x24 or 32x48 pixels each.
    pixels = 4 * 3 * (16 if name == "wan2.1" else 32) * (24 if name == "wan2.1" else 48) * 4
    assert three.kept == 3 * one.kept
    assert one.working <= three.working <= one.working + 6 * pixels


def test_room_is_left_on_a_gpu_alone() -> None:
    model, vae = pico.dense_model(), tiny_vae()
    reserve([model], vae, 2, 3, 2, GPU)
    assert model.kernels is None
    model.set_kernels("torch")
    counted = decoding_bytes(vae, 2, 3)
    for streams, device, given, expected in (
        (2, GPU, vae, 2 * counted.kept + counted.working),
        (2, GPU, None, 0),
        (1, GPU, vae, counted.kept + counted.working),
        (1, torch.device("cpu"), vae, 0),
    ):
        reserve([model], given, 2, 3, streams, device)
        assert model.kernels.left_free == expected


def test_the_table_of_the_documentation_is_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RESULTS))
    script = importlib.import_module("vae_memory")
    found = script.counted()
    assert found == json.loads((RESULTS / "vae_memory.json").read_text(encoding="utf-8"))
    assert script.table(found) == (RESULTS / "vae_memory.md").read_text(encoding="utf-8")
