"""fp16 on the CPU: Accelerate requires a GPU for it, so it gets torch's own loss scaler, which does not."""

from __future__ import annotations

import distill_case as case
import pytest
import torch
from accelerate import Accelerator

from mla_convert.distill import runtime, trainer
from mla_convert.distill.metrics import Metrics


class Half(Accelerator):
    """An Accelerator as it is with mixed_precision fp16 on a GPU."""

    # Scaled by so much, gradients overflow fp16's largest number until the scale has been lowered.
    first_scale = 2.0**30

    def __init__(self, **settings) -> None:
        super().__init__(**settings | {"mixed_precision": "no"})
        self.state._mixed_precision = "fp16"
        self.native_amp = True
        self.scaler = torch.amp.GradScaler("cpu", init_scale=self.first_scale, backoff_factor=2.0**-8)


@pytest.fixture
def half(monkeypatch):
    monkeypatch.setattr(runtime, "Accelerator", Half)
    monkeypatch.setattr(trainer, "check_launch", lambda config: None)


def test_overflows_are_left_out_and_a_resumed_stage_is_the_same(half, tmp_path):
    case.whole_and_resumed(tmp_path, 9, mixed_precision="fp16")
    rows = Metrics(tmp_path / "whole" / "metrics.jsonl").rows()[1:]
    overflowed = [row["grad_norm"] is None for row in rows]
    assert any(overflowed[:4]) and not any(overflowed[4:])
    assert case.outputs(tmp_path / "whole") == case.outputs(tmp_path / "resumed")


def test_it_learns_what_float32_learns(half, tmp_path, monkeypatch):
    monkeypatch.setattr(Half, "first_scale", 2.0**10)
    lower, _ = case.train(tmp_path / "half", mixed_precision="fp16")
    monkeypatch.undo()
    full, _ = case.train(tmp_path / "full")
    # Observed: 4e-4.
    assert lower.final_loss == pytest.approx(full.final_loss, rel=4e-3)
