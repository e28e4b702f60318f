"""All sections that sample a model have the same keys, with the same checks and the same meaning."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from recipe_case import RECIPE, write_teacher

from mla_convert.distill.keys import PreviewConfig
from mla_convert.distill.latents import LatentShards
from mla_convert.distill.rollouts import RolloutsConfig
from mla_convert.draws import Use, drawn_seed
from mla_convert.errors import UsageError
from mla_convert.evaluate import digits_bench as bench
from mla_convert.evaluate.config import EvaluateConfig
from mla_convert.evaluate.rollouts import digit_rollouts, heldout_prompts
from mla_convert.load import load_dense, load_source
from mla_convert.pipeline import run
from mla_convert.pipeline.preview import as_strip, preview_strip
from mla_convert.recipe.load import parse_recipe
from mla_convert.run.config import GenerateConfig
from mla_convert.run.stream import stream_chunks
from mla_convert.sampling import SamplingConfig
from mla_convert.zoo.digits.data import parse_prompt

SECTIONS = {
    GenerateConfig: ({}, 8),
    RolloutsConfig: ({"clips": 4, "prompts": ("7 moving up",)}, 48),
    PreviewConfig: ({"every": 1}, 4),
    EvaluateConfig: ({}, 8),
}
FEW = {"sampler": "renoise", "denoising_steps": [1000, 500], "shift": 3.0, "context_noise": 0.1}


@pytest.mark.parametrize("section", SECTIONS)
def test_sections_share_keys_and_checks_and_have_their_own_defaults(section):
    needed, steps = SECTIONS[section]
    config = section(**needed)
    assert isinstance(config, SamplingConfig)
    assert config.sampling() == SamplingConfig(num_inference_steps=steps).sampling()
    assert section(**needed, **FEW).sampling()["denoising_steps"] == (1000, 500)
    for key in ("denoising_steps", "first_chunk_steps"):
        with pytest.raises(
            ValidationError, match=r"the steps must fall from at most 1000 to at least 1, got \[250, 500, 5000\]"
        ):
            section(**needed, **{key: (250, 500, 5000)})
    for wrong in ({"sampler": "ddim"}, {"shift": 0}, {"context_noise": 2}, {"num_inference_steps": 0}, {"steps": 4}):
        with pytest.raises(ValidationError):
            section(**needed, **wrong)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teacher"))


def recipe(teacher, *overrides):
    return parse_recipe(RECIPE.format(teacher=teacher), overrides)


def test_recipes_say_it_in_one_line(teacher):
    for key in ("distill.0.preview={every: 1, denoising_steps: [250, 500, 5000]}", "evaluate.first_chunk_steps=[1, 2]"):
        with pytest.raises(UsageError, match=r"the steps must fall from at most 1000") as error:
            recipe(teacher, key)
        assert "\n" not in str(error.value)
    assert recipe(teacher, "evaluate.denoising_steps=[1000, 500]").evaluate.denoising_steps == (1000, 500)


def test_a_teacher_of_few_steps_makes_its_own_clips(teacher, tmp_path):
    data = (
        "data={kind: rollouts, heldout: 1, rollouts: {clips: 2, num_frames: 6, batch_size: 2, prompts: [7 moving up], "
        "sampler: renoise, denoising_steps: [1000, 500], first_chunk_steps: [1000], shift: 3.0, context_noise: 0.1}}"
    )
    run(recipe(teacher, data), tmp_path / "run", until="data")
    made = LatentShards(tmp_path / "run" / "data")
    text = parse_prompt("7 moving up").embedding().expand(2, -1, -1)
    dense, seed = load_dense(load_source(str(teacher))), drawn_seed(Use.ROLLOUT, 0, 0)

    def rolled(**changes):
        settings = {**FEW, "first_chunk_steps": [1000], **changes}
        return torch.cat(list(stream_chunks(dense, text, 6, 16, 16, seed=seed, **settings)), dim=2)

    for clip, expected, euler in zip(range(2), rolled(), rolled(sampler="euler"), strict=True):
        assert torch.equal(made.read(clip)["latents"], expected)
        assert not torch.equal(expected, euler)


def test_previews_and_evaluations_are_sampled_as_they_say(teacher):
    dense = load_dense(load_source(str(teacher)))
    few = {**FEW, "first_chunk_steps": (1000,)}
    text, _ = heldout_prompts(2)
    expected = torch.cat(list(stream_chunks(dense, text, 6, 16, 16, **few)), dim=2)
    videos, _ = digit_rollouts(dense, 6, EvaluateConfig(rollout_prompts=2, **few))
    assert torch.equal(videos, expected)
    held = {"latents": torch.zeros(2, 1, 6, 16, 16), "encoder_hidden_states": text}
    strip = preview_strip(dense, PreviewConfig(every=1, **few), held)
    assert (strip == as_strip(expected)).all()


def test_the_teacher_of_an_evaluation_takes_euler_steps(monkeypatch):
    asked = {}

    def rolled(model, frames, config, told):
        asked[model] = config
        return torch.zeros(config.rollout_prompts, 1, frames, 16, 16), None

    monkeypatch.setattr(bench, "digit_rollouts", rolled)
    config = EvaluateConfig(rollout_prompts=2, long_factor=0, num_inference_steps=3, **FEW)
    bench.digits_bench({"teacher": "dense", "student": "latent"}, config, lambda *told: None)
    assert asked["latent"] == config
    assert asked["dense"].sampling() == config.sampling() | {"sampler": "euler", "denoising_steps": None}
