"""int8 rows in groups of 64."""

from __future__ import annotations

import pytest
import torch
from kernel_case import error, randn
from mla_attention import dequantize_rows, quantize_rows


@pytest.mark.parametrize("width", [16, 64, 96, 224])
def test_error_is_half_a_step(width):
    rows = randn(2, 5, width)

    steps, scales = quantize_rows(rows)

    assert steps.dtype == torch.int8 and scales.dtype == torch.float16
    assert scales.shape == (2, 5, -(-width // 64))
    restored = dequantize_rows(steps, scales, torch.float32)
    half_step = scales.float().repeat_interleave(64, dim=-1)[..., :width] / 2
    # Rounding the scale to float16 may clip the largest value of a group, by at most 2**-11 of it.
    assert bool(((restored - rows).abs() <= half_step + 2**-11 * 127 * 2 * half_step).all())
    assert error(restored, rows) < 8e-3  # 5.6e-3


def test_groups_have_their_own_scale():
    rows = torch.cat([randn(3, 64), 1e-3 * randn(3, 64, seed=1)], dim=-1)
    small = dequantize_rows(*quantize_rows(rows), torch.float32)[:, 64:]
    assert error(small, rows[:, 64:]) < 8e-3  # 5.7e-3


def test_zeros_and_extremes():
    rows = torch.zeros(3, 128)
    rows[1, :64] = 3e38
    rows[2, 64:] = 1e-30

    steps, scales = quantize_rows(rows)

    assert not steps[0].any() and not scales[0].any()
    assert float(scales[1, 0]) == 65504 and int(steps[1, 0]) == 127
    assert not steps[2].any()
    assert bool(dequantize_rows(steps, scales, torch.float32).isfinite().all())


def test_rows_that_are_quantized_already_stay():
    steps, scales = quantize_rows(randn(4, 96))
    again, _ = quantize_rows(dequantize_rows(steps, scales, torch.float32))
    assert torch.equal(again, steps)


def test_scales_must_fit():
    steps, scales = quantize_rows(randn(4, 96))
    with pytest.raises(ValueError, match=r"scales are \[4, 1\] and do not fit rows \[4, 96\] in groups of 64"):
        dequantize_rows(steps, scales[:, :1], torch.float32)
