"""`teacher_forcing` compared with denoising chunk by chunk with a cache."""

from __future__ import annotations

import math

import distill_case as case
import pico
import pytest
import torch
from pydantic import ValidationError

from mla_convert.distill.objective import noised_clips
from mla_convert.distill.stages.teacher_forcing import TeacherForcing, TeacherForcingConfig, bell_weight
from mla_convert.distill.trainer import run_stage
from mla_convert.errors import UserError

SHIFT = 5.0


def naive_weight(t: float) -> float:
    """The bell-shaped weights over 1000 shifted training steps, written out."""
    steps = [SHIFT * k / 1000 / (1 + (SHIFT - 1) * k / 1000) for k in range(1, 1001)]
    bells = [math.exp(-2 * (step - 0.5) ** 2) for step in steps]
    scale = 1000 / sum(bell - min(bells) for bell in bells)
    return max(0.0, math.exp(-2 * (t - 0.5) ** 2) - min(bells)) * scale


@torch.no_grad()
def streamed_loss(model, clips, weighting, context_noise):
    """The mean of the weighted errors of the chunks, with histories from a cache."""
    generator = torch.Generator().manual_seed(3)
    latents, text = clips["latents"], clips["encoder_hidden_states"]
    noised = noised_clips(latents, text, model.causal, generator, shift=SHIFT, context_noise=context_noise)
    cache, total = model.init_cache(len(latents), *latents.shape[3:]), 0.0
    for start, stop in model.causal.chunks(latents.shape[2]):
        t, context = noised.t[:, start:stop], noised.context[:, :, start:stop]
        v = model.forward_chunk(noised.x_t[:, :, start:stop], 1000 * t, text, cache)
        model.forward_chunk(context, 1000 * noised.t_context, text, cache, write=True)
        for clip, error in enumerate((v - noised.target[:, :, start:stop]).square()):
            total += (naive_weight(t[clip, 0].item()) if weighting == "bell" else 1.0) * error.sum().item()
    return total / latents.numel()


@pytest.mark.parametrize("context_noise", [0.0, 0.5])
@pytest.mark.parametrize("weighting", ["none", "bell"])
def test_loss_is_chunk_by_chunk_with_a_cache(weighting, context_noise):
    model, clips = case.tiny_model().eval(), case.Clips().heldout()
    changes = {"weighting": weighting, "timestep_shift": SHIFT, "context_noise": context_noise}
    stage = TeacherForcing(case.make_config("teacher_forcing", **changes))
    assert stage.networks == ()
    loss, _ = stage.loss({"student": model}, clips, torch.Generator().manual_seed(3))
    # Observed: 1.1e-7.
    assert loss.item() == pytest.approx(streamed_loss(model, clips, weighting, context_noise), rel=1e-5)


def test_weight_has_a_mean_of_one_over_the_training_steps():
    steps = torch.arange(1, 1001) / 1000
    t = SHIFT * steps / (1 + (SHIFT - 1) * steps)
    assert bell_weight(t, SHIFT).mean().item() == pytest.approx(1, rel=1e-5)
    assert bell_weight(torch.tensor(0.5), SHIFT) > bell_weight(torch.tensor(0.9), SHIFT)


@pytest.mark.parametrize("change", [{"weighting": "gauss"}, {"context": "noisy"}, {"teacher_weight": 1}])
def test_configuration_is_strict(change):
    with pytest.raises(ValidationError):
        TeacherForcingConfig(steps=1, learning_rate=1e-3, **change)


def test_resume_ends_with_the_same_bytes(tmp_path):
    _, expected = case.train(tmp_path / "whole", stage="teacher_forcing")
    with pytest.raises(case.Killed):
        case.train(tmp_path / "resumed", last_clip=10, stage="teacher_forcing")
    _, weights = case.train(tmp_path / "resumed", stage="teacher_forcing")
    assert case.outputs(tmp_path / "resumed") == case.outputs(tmp_path / "whole")
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("weighting", ["none", "bell"])
def test_a_flow_map_is_trained_where_both_times_are_the_same(weighting):
    model = pico.dense_model(family="anyflow_far", causal=None)
    latents, _, text = pico.inputs(4, 8, 8, 8)
    stage = TeacherForcing(case.make_config("teacher_forcing", weighting=weighting))
    batch = {"latents": latents, "encoder_hidden_states": text}
    loss, _ = stage.loss({"student": model}, batch, torch.Generator().manual_seed(3))
    noised = noised_clips(latents, text, model.causal, torch.Generator().manual_seed(3))
    t = 1000 * noised.t
    given = {"context": noised.context, "context_timestep": 1000 * noised.t_context}
    squared = (model(noised.x_t, t, text, r_timestep=t, **given).sample - noised.target).square()
    weight = bell_weight(noised.t, 1.0).view(4, 1, 8, 1, 1) if weighting == "bell" else 1.0
    # Observed: 0; with other second times 8.6e-5 away and more.
    assert loss.item() == pytest.approx((weight * squared).mean().item(), rel=1e-6)
    elsewhere = model(noised.x_t, t, text, r_timestep=0 * t, **given).sample - noised.target
    assert loss.item() != pytest.approx((weight * elsewhere.square()).mean().item(), rel=1e-5)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    """The last good checkpoint keeps its weights."""

    class Poisoned(case.Clips):
        def example(self, index):
            clip = super().example(index)
            return clip if index < 10 else {**clip, "latents": clip["latents"] * float("nan")}

    config = case.make_config("teacher_forcing")
    with pytest.raises(
        UserError, match=r"stage teacher_forcing diverged: loss is nan at step 6; the last good .*00003"
    ):
        run_stage(config, case.tiny_model(), {}, Poisoned(), None, tmp_path, 0, 0)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
