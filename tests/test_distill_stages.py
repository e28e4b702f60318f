"""Losses: the packed forward compared with chunk-by-chunk streaming, and what each stage requires."""

from __future__ import annotations

import distill_case as case
import pytest
import torch
from pydantic import ValidationError

from mla_convert import flow
from mla_convert.distill.objective import flow_loss, noised_clips, predict_velocity
from mla_convert.distill.schedule import learning_rate
from mla_convert.distill.stages.base import Stage, StageConfig
from mla_convert.distill.stages.match_velocity import MatchVelocityConfig
from mla_convert.distill.trainable import trainable_names
from mla_convert.errors import UsageError
from mla_convert.registry import stages

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def clips():
    return case.Clips().heldout()


def draw(clips, causal, **settings):
    generator = torch.Generator().manual_seed(3)
    return noised_clips(clips["latents"], clips["encoder_hidden_states"], causal, generator, **settings)


@torch.no_grad()
def stream_velocity(model, noised):
    """Chunk by chunk, with a cache of clean (or `context`) chunks."""
    batch, _, frames, height, width = noised.x_t.shape
    cache = model.init_cache(batch, height, width)
    copies = batch // len(noised.context)
    context, t_context = noised.context.repeat(copies, 1, 1, 1, 1), noised.t_context.repeat(copies)
    velocities = []
    for start, stop in model.causal.chunks(frames):
        timestep = 1000 * noised.t[:, start:stop]
        velocities.append(model.forward_chunk(noised.x_t[:, :, start:stop], timestep, noised.text, cache))
        model.forward_chunk(context[:, :, start:stop], 1000 * t_context, noised.text, cache, write=True)
    return torch.cat(velocities, dim=2)


@pytest.mark.parametrize("context_noise", [0.0, 0.5])
def test_packed_teacher_forcing_is_chunk_by_chunk_with_a_cache(clips, context_noise):
    model = case.tiny_model().eval()
    noised = draw(clips, model.causal, copies=3, context_noise=context_noise)
    with torch.no_grad():
        packed = predict_velocity(model, noised)
    # Observed: 1e-6 for velocities of order 1.
    assert (packed - stream_velocity(model, noised)).abs().max() < TOLERANCE


def test_flow_loss_is_the_error_of_the_streamed_velocity(clips):
    model = case.tiny_model().eval()
    generator = torch.Generator().manual_seed(1)
    noised = noised_clips(clips["latents"], clips["encoder_hidden_states"], model.causal, generator)
    expected = (stream_velocity(model, noised) - noised.target).square().mean().item()
    assert flow_loss(model, clips, seed=1) == pytest.approx(expected, abs=TOLERANCE)
    assert flow_loss(model, clips, seed=1) != flow_loss(model, clips, seed=2)


def test_flow_loss_in_smaller_forwards_is_the_same(clips):
    """The noise does not depend on the number of clips per forward; the largest forward has the requested size."""
    model, seen = case.tiny_model().eval(), []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    whole, in_ones = flow_loss(model, clips), flow_loss(model, clips, forward_size=1)
    # Observed: 1e-7.
    assert in_ones == pytest.approx(whole, rel=1e-6)
    assert seen == [2, 1, 1]


def test_noise_levels(clips):
    causal = case.tiny_model().causal
    noised = draw(clips, causal, copies=4, shift=5.0)
    assert noised.t.shape == (8, 16)
    chunks = causal.chunks(16)
    for start, stop in chunks:
        assert torch.equal(noised.t[:, start:stop], noised.t[:, start : start + 1].expand(-1, stop - start))
    assert len(noised.t.unique()) == 8 * len(chunks)
    plain = draw(clips, causal, copies=4)
    torch.testing.assert_close(noised.t, flow.shift_time(plain.t, 5.0))
    torch.testing.assert_close(flow.to_clean(plain.x_t, plain.target, plain.t), clips["latents"].repeat(4, 1, 1, 1, 1))
    assert torch.equal(plain.context, clips["latents"])
    assert draw(clips, causal, clean_history=False).context is None


def match_velocity(clips, student, teacher=None, **changes):
    stage = stages()["match_velocity"](case.make_config(**changes))
    return stage.loss({"student": student, "teacher": teacher}, clips, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("context", ["clean", "noisy"])
def test_match_velocity_mixes_teacher_and_data(clips, context):
    teacher = case.tiny_model()
    student = case.perturbed(teacher)
    noised = draw(clips, student.causal, copies=2, clean_history=context == "clean")
    with torch.no_grad():
        velocity = predict_velocity(student, noised)
        to_teacher = (velocity - predict_velocity(teacher, noised)).square().mean()
        to_data = (velocity - noised.target).square().mean()
    settings = {"copies": 2, "context": context}
    for weight in (0.0, 0.25, 1.0):
        loss, logs = match_velocity(clips, student, teacher, teacher_weight=weight, **settings)
        torch.testing.assert_close(loss, weight * to_teacher + (1 - weight) * to_data)
        torch.testing.assert_close(logs["data_loss"], to_data)
    loss, _ = match_velocity(clips, teacher, teacher, **settings)
    assert loss.item() == 0


def test_match_velocity_sends_no_gradient_to_the_teacher(clips):
    teacher = case.tiny_model()
    loss, _ = match_velocity(clips, case.perturbed(teacher), teacher)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_stages_name_the_networks_they_need():
    assert all(issubclass(stage, Stage) and stage.name == name for name, stage in stages().items())
    stage = stages()["match_velocity"]
    assert stage(case.make_config()).networks == ("teacher",)
    assert stage(case.make_config(teacher_weight=0)).networks == ()


@pytest.mark.parametrize("change", [{"sceduled": 1}, {"steps": 0}, {"teacher_weight": 1.5}, {"context": "self"}])
def test_configuration_is_strict(change):
    with pytest.raises(ValidationError):
        case.make_config(**change)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.8535534, 0.5, 0.1464466]),
    ],
)
def test_learning_rate(schedule, expected):
    config = MatchVelocityConfig(steps=6, learning_rate=1.0, warmup_steps=2, schedule=schedule)
    assert [learning_rate(config, step) for step in range(6)] == pytest.approx(expected)


def test_trainable_parameters():
    model = case.tiny_model()
    every = {name for name, _ in model.named_parameters()}
    assert trainable_names(model, "all") == every
    attention = trainable_names(model, "attention")
    assert attention == {name for name in every if ".attn1." in name}
    with pytest.raises(UsageError, match=r"trainable: latent finds no parameters in CausalWanTransformer3DModel"):
        trainable_names(model, "latent")
    model.blocks[0].attn1.kv_a_proj = torch.nn.Linear(4, 2)
    model.blocks[0].attn1.q_pe_coef = torch.nn.Parameter(torch.ones(2))
    prefix = "blocks.0.attn1."
    expected = {prefix + name for name in ("kv_a_proj.weight", "kv_a_proj.bias", "q_pe_coef")}
    assert trainable_names(model, "latent") == expected


def test_default_keys_are_those_of_every_stage():
    shared = set(StageConfig.model_fields)
    assert all(shared <= set(stage.config_class.model_fields) for stage in stages().values())
