"""Latents in int8: lost precision and saved memory."""

from __future__ import annotations

from typing import Any

import mla_attention
import pico
import pytest
import torch

from mla_convert.mla.quantized import GROUP, Int8LatentCache, dequantize, quantize

FRAMES, HEIGHT, WIDTH = 9, 6, 4


@pytest.mark.parametrize("width", [1, 63, 64, 100, 224])
def test_error_is_half_a_step_of_its_group(width: int) -> None:
    rows = torch.randn(3, 5, width) * torch.logspace(-3, 3, 5).view(-1, 1)
    values, scales = quantize(rows)
    assert values.dtype == torch.int8 and values.shape == rows.shape
    assert scales.shape == (3, 5, -(-width // GROUP))
    step = scales.float().repeat_interleave(GROUP, dim=-1)[..., :width]
    # The scale itself is rounded to float16, so that the largest value may lie a little outside.
    assert ((dequantize(values, scales) - rows).abs() <= 0.51 * step + 0.001 * rows.abs()).all()


def test_zeros_and_the_format_of_the_kernels() -> None:
    rows = torch.randn(2, 4, 96)
    rows[0] = 0
    # More than 127 times the largest scale in float16.
    rows[1, 0] = 1e8
    values, scales = quantize(rows)
    assert (dequantize(values, scales)[1, 0] == 127 * 65504.0).all()
    assert torch.equal(dequantize(values, scales)[0], torch.zeros(4, 96))
    assert torch.equal(mla_attention.dequantize_rows(values, scales, torch.float32), dequantize(values, scales))
    theirs, their_scales = mla_attention.quantize_rows(rows)
    assert torch.equal(their_scales, scales)
    # Halves may be rounded to either side.
    assert (theirs.int() - values.int()).abs().max() <= 1


@pytest.mark.parametrize("variant", pico.VARIANTS, ids=lambda v: f"{v['position']}-{v['own_chunk']}")
def test_a_rollout_with_an_int8_cache(variant: dict[str, Any]) -> None:
    # Ranks for which eight tiny clips suffice: a latent that they never moved varies 200-fold on others, and
    # then sets the scale of its group.
    model = pico.convert(pico.dense_model(heads=3), **variant | {"kv_lora_rank": 14})
    latents, timestep, text = pico.inputs(2, FRAMES, HEIGHT, WIDTH)
    with torch.no_grad():
        expected, _ = pico.stream(model, latents, timestep, text)
        cache = model.init_cache(2, HEIGHT, WIDTH, dtype=torch.int8)
        chunks = [
            model.forward_chunk(latents[:, :, a:b], timestep[:, a:b], text, cache, write=True)
            for a, b in model.causal.chunks(FRAMES)
        ]
    assert isinstance(cache, Int8LatentCache)
    # Observed 3e-4 to 5e-4: a scale is 1/127 of the largest of 64 scalars.
    assert 0 < pico.relative_error(torch.cat(chunks, dim=2), expected) < 2e-3


def test_bytes() -> None:
    model = pico.convert(pico.dense_model(heads=3), position="rotate_on_read", kv_lora_rank=20)
    full, small = (model.init_cache(2, HEIGHT, WIDTH, dtype=dtype) for dtype in (torch.float32, torch.int8))
    tokens = 2 * 5 * 6 * 2
    assert full.bytes() == tokens * 20 * 4 and small.bytes() == tokens * (20 + 2)
    assert small.scalars_per_token() == full.scalars_per_token()


def test_dense_models_have_none() -> None:
    with pytest.raises(ValueError, match="CausalWanTransformer3DModel has no cache in int8"):
        pico.dense_model().init_cache(1, HEIGHT, WIDTH, dtype=torch.int8)
