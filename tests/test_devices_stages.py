"""Every stage trains and resumes on a simulated GPU as on the CPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import image_case
import pico
import pytest
import torch
from device_case import FEW, Clips, model, same
from pretend_gpu import GPU
from torch import Tensor

from mla_convert.convert import ConvertConfig, clip_batches, convert_model
from mla_convert.distill.data import Batch
from mla_convert.distill.trainer import run_stage
from mla_convert.evaluate.fidelity import fidelity
from mla_convert.export.manifest import family_of
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
    """Two steps, the second after an interruption; `match_attention` has shared latents."""
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


class ImageClips(Clips):
    """Clips with the inputs of Wan2.1's image-to-video models."""

    def heldout(self, count: int, seed: int = 99) -> Batch:
        latents, _ = image_case.latents(6, count, seed)
        text = image_case.text("wan2.1", count, seed)
        return {
            "latents": latents,
            "encoder_hidden_states": text,
            **image_case.conditions("wan2.1", 6, count, seed + 1),
        }

    def example(self, index: int) -> Batch:
        return {name: x[0] for name, x in self.heldout(1, index).items()}


@pytest.mark.parametrize("name", TRAINED)
def test_stages_train_on_images(name: str, tmp_path: Path) -> None:
    """The model is calibrated on images before training and measured after it."""
    stage = stages()[name].config_class
    settings = {"steps": 1, "learning_rate": 1e-3, "batch_size": 1, "checkpoint_every": None, "tracker": None}
    config = stage(stage=name, **settings, epsilon=1e-2, trainable="attention", **TRAINED[name])
    layout = ConvertConfig(calibration=pico.calibration(clips=2, batch_size=1), **pico.LAYOUTS[3])

    def trained(device: torch.device) -> Tensor:
        data, teacher = ImageClips(None), image_case.model("wan2.1")
        batches = clip_batches(data.example, range(2), 1)
        student = convert_model(family_of(type(teacher)), copy.deepcopy(teacher).to(device), layout, batches)
        folder, held = tmp_path / device.type, data.heldout(2)
        result = run_stage(config, student, {"teacher": teacher}, data, held, folder, 0, 0, picture=preview_strip)
        found = fidelity(student, teacher.to(device), held, 1, seed=0)
        # Not the weights: the directions of a fit have no sign of their own.
        return torch.tensor([result.final_loss, result.heldout_loss, found["student_loss"], found["teacher_loss"]])

    # Observed: 2.4e-7 of 2.5.
    same(trained)
