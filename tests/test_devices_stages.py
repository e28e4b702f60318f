"""Every stage trains on a GPU that is pretended, and goes on from a checkpoint, as on the CPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from device_case import FEW, Clips, model, same
from pretend_gpu import GPU
from torch import Tensor

from mla_convert.distill.trainer import run_stage
from mla_convert.pipeline.preview import preview_strip
from mla_convert.registry import stages

PREVIEW = {"every": 1, "clips": 1, "num_frames": 2, **FEW}
TRAINED: dict[str, dict[str, Any]] = {
    "match_velocity": {"lora": {"rank": 2, "alpha": 2}, "preview": PREVIEW, "ema_decay": 0.5},
    "match_attention": {"max_grad_norm": None},
    "teacher_forcing": {"gradient_checkpointing": True, "empty_prompt_rate": 0.5, "optimizer": "adafactor"},
    "consistency": {"solver_steps": 4, "ema_decay": 0.5, "teacher": "start"},
    "dmd": {"denoising_steps": (1000, 500), "sampler": "renoise", "context_noise": 0.1, "critic_updates": 1},
}


@pytest.mark.parametrize("name", TRAINED)
def test_stages_train_and_go_on_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    """By two steps, the second after an interruption; the stage of shared latents is `match_attention`."""
    stage = stages()[name].config_class
    settings = {"steps": 2, "learning_rate": 1e-3, "batch_size": 1, "checkpoint_every": 1, "tracker": None}
    # A large epsilon, so that Adam does not make rounding as large as a gradient.
    config = stage(stage=name, **settings, epsilon=1e-2, trainable="attention", **TRAINED[name])
    start = model(6, layers_per_latent=2) if name == "match_attention" else model()

    def trained(device: torch.device) -> list[Tensor]:
        def run(stop: int | None) -> Any:
            student, data = copy.deepcopy(start), Clips(stop)
            teacher = {"teacher": copy.deepcopy(model(None))}
            folder = tmp_path / device.type
            result = run_stage(config, student, teacher, data, data.heldout(2), folder, 0, 0, picture=preview_strip)
            assert student.device == device
            return result, [parameter.detach().cpu() for parameter in student.parameters()]

        if device == GPU:
            with pytest.raises(KeyboardInterrupt):
                run(2 if name == "dmd" else 1)
        result, parameters = run(None)
        assert result.resumed_from == (1 if device == GPU else None)
        return [torch.tensor([result.final_loss, result.heldout_loss]), *parameters]

    # Observed no difference.
    same(trained)
