"""Few-step models are calibrated, repaired and measured at the noise levels they know, and at no others."""

from __future__ import annotations

import distill_case as case
import pico
import pytest
import torch
from pydantic import ValidationError
from recipe_case import RECIPE, write_teacher

from mla_convert import flow
from mla_convert.convert.blocks import ModelBlocks
from mla_convert.convert.clips import enter_clips
from mla_convert.convert.config import CalibrationConfig
from mla_convert.convert.store import TensorStore
from mla_convert.distill.metrics import Metrics
from mla_convert.distill.objective import flow_loss, noised_clips
from mla_convert.distill.stages.match_velocity import MatchVelocityConfig
from mla_convert.distill.stages.noised import noised_batch
from mla_convert.distill.trainer import run_stage
from mla_convert.errors import UsageError
from mla_convert.evaluate.config import EvaluateConfig
from mla_convert.evaluate.fidelity import fidelity
from mla_convert.pipeline import run
from mla_convert.recipe.load import parse_recipe
from mla_convert.recipe.shipped import shipped_recipes
from mla_convert.run.stream import stream_chunks

STEPS, SHIFT = (1000, 750, 500, 250), 5.0
# Self-Forcing's own, by its scheduler: 5 s / (1 + 4 s) of s = 1, 3/4, 1/2, 1/4.
LEVELS = (1.0, 15 / 16, 5 / 6, 5 / 8)
CHUNKS = [(0, 2), (2, 4), (4, 6)]


def only(t):
    """Whether the noise levels are exactly the four."""
    found = sorted({round(float(value), 6) for value in t.flatten()}, reverse=True)
    return found == pytest.approx(LEVELS, abs=1e-6)


def test_levels_are_those_that_the_steps_visit():
    assert flow.noise_levels(STEPS, SHIFT) == pytest.approx(LEVELS)
    assert flow.noise_levels(None, SHIFT) is None
    visited = []
    model = pico.dense_model()

    forward = model.forward_chunk

    def watched(x, timestep, *rest, **keywords):
        visited.append(float(timestep.flatten()[0]) / 1000)
        return forward(x, timestep, *rest, **keywords)

    model.forward_chunk = watched
    _, _, text = pico.inputs(1, 2, 4, 4)
    list(stream_chunks(model, text, 2, 4, 4, denoising_steps=STEPS, shift=SHIFT))
    assert visited == pytest.approx(LEVELS)


def test_chunks_draw_each_level_alike_and_no_other():
    levels = flow.noise_levels(STEPS, SHIFT)
    t = flow.chunk_times(1000, CHUNKS, torch.Generator().manual_seed(0), levels=levels)
    assert t.shape == (1000, 6) and only(t)
    assert torch.equal(t[:, 0], t[:, 1])
    for level in levels:
        # Observed: 0.24 to 0.26.
        assert float((t == level).float().mean()) == pytest.approx(0.25, abs=0.02)


def test_an_expert_draws_those_of_its_range_and_is_refused_where_there_is_none():
    levels = flow.noise_levels(STEPS, SHIFT)
    t = flow.chunk_times(200, CHUNKS, torch.Generator().manual_seed(0), 1.0, (0.875, 1.0), levels)
    assert set(t.unique().tolist()) == set(levels[:2])
    with pytest.raises(UsageError, match=r"none of the denoising_steps, .* 0\.625, is in .* \[0, 0\.5\]; leave"):
        flow.chunk_times(1, CHUNKS, torch.Generator(), 1.0, (0.0, 0.5), levels)


def test_a_stage_trains_and_measures_at_its_levels(tmp_path):
    config = case.make_config(denoising_steps=STEPS, timestep_shift=SHIFT, steps=2, copies=8, checkpoint_every=None)
    assert isinstance(config, MatchVelocityConfig)
    teacher = case.tiny_model().eval()
    clips = noised_batch(config, case.Clips().heldout(), teacher, torch.Generator().manual_seed(0))
    assert only(clips.t) and not clips.t_context.any()

    run_stage(
        config, case.perturbed(teacher), {"teacher": teacher}, case.Clips(), case.Clips().heldout(), tmp_path, 0, 1
    )

    first = Metrics(tmp_path / "metrics.jsonl").rows()[0]
    held = case.Clips().heldout()
    assert first["teacher_heldout_loss"] == pytest.approx(flow_loss(teacher, held, levels=LEVELS), rel=1e-6)
    assert first["teacher_heldout_loss"] != pytest.approx(flow_loss(teacher, held), rel=1e-3)


def test_calibration_enters_clips_at_its_levels():
    settings = pico.calibration(denoising_steps=STEPS, timestep_shift=SHIFT)
    entered = enter_clips(ModelBlocks(pico.dense_model()), pico.batches(), CalibrationConfig(**settings), TensorStore())
    assert only(torch.cat([t for t, _ in entered.times]))
    # All levels are warped by the shift alone.
    config = CalibrationConfig(**pico.calibration(timestep_shift=SHIFT))
    plain = CalibrationConfig(**pico.calibration())
    warped, even = (
        torch.cat(
            [t for t, _ in enter_clips(ModelBlocks(pico.dense_model()), pico.batches(), one, TensorStore()).times]
        )
        for one in (config, plain)
    )
    assert torch.equal(warped, flow.shift_time(even, SHIFT))


def test_an_evaluation_speaks_of_its_levels_alone():
    dense = pico.dense_model()
    student = pico.convert(dense, kv_lora_rank=8)
    latents, _, text = pico.inputs(8, 6, 6, 4)
    clips = {"latents": latents, "encoder_hidden_states": text}
    levels = EvaluateConfig(denoising_steps=STEPS, shift=SHIFT).noise_levels
    found = fidelity(student, dense, clips, batch_size=4, seed=0, levels=levels)
    assert [middle for middle, _ in found["velocity_rel_error_by_timestep"]] == [0.65, 0.85, 0.95]
    assert EvaluateConfig(shift=3.0).noise_levels is None
    noised = noised_clips(latents, text, dense.causal, torch.Generator().manual_seed(0), levels=levels)
    assert only(noised.t)


@pytest.mark.parametrize("config", [CalibrationConfig, EvaluateConfig, MatchVelocityConfig])
@pytest.mark.parametrize("steps", [(250, 500), (5000,), (), (500, 0)])
def test_impossible_steps_are_refused(config, steps):
    needed = {"steps": 1, "learning_rate": 1e-3} if config is MatchVelocityConfig else {}
    with pytest.raises(ValidationError, match="the steps must fall from at most 1000 to at least 1"):
        config(denoising_steps=steps, **needed)


def test_a_run_of_an_expert_is_refused_before_it_begins(tmp_path):
    teacher = write_teacher(tmp_path / "teacher")
    changes = ["source.noise_range=[0.0, 0.5]", "evaluate.rollout_prompts=0", "generate.prompts=[]"]
    for key in ("convert.calibration", "distill.0", "evaluate"):
        shift = "shift" if key == "evaluate" else "timestep_shift"
        few = [f"{key}.denoising_steps=[1000, 500]", f"{key}.{shift}=5.0"]
        with pytest.raises(UsageError, match=rf"{key}: none of the denoising_steps, .* \[0, 0\.5\]"):
            run(parse_recipe(RECIPE.format(teacher=teacher), [*changes, *few]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["self-forcing-1.3b", "causal-forcing-1.3b", "longlive-1.3b"])
def test_recipes_of_few_steps_use_the_levels_of_their_sampler(name):
    recipe = parse_recipe(shipped_recipes()[name].read_text())
    sampled = flow.noise_levels(recipe.generate.denoising_steps, recipe.generate.shift)
    (stage,) = recipe.distill
    assert recipe.convert.calibration.noise_levels == stage.noise_levels == recipe.evaluate.noise_levels == sampled
    assert sampled == pytest.approx(LEVELS)
