"""The negative prompt: one embedding for calibration, training, the teacher's rollouts and sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import distill_case as case
import pytest
import torch
from recipe_case import RECIPE, write_teacher
from safetensors.torch import load_file, save_file
from torch import Tensor

from mla_convert.distill.clip_shards import Clip, write_latents
from mla_convert.distill.data import DataConfig, open_data
from mla_convert.distill.latents import LatentShards
from mla_convert.distill.negative import NEGATIVE, read_negative
from mla_convert.distill.stages import consistency, noised
from mla_convert.distill.stages.consistency import Consistency
from mla_convert.distill.stages.match_velocity import MatchVelocity
from mla_convert.distill.trainer import run_stage
from mla_convert.draws import Use, drawn_seed
from mla_convert.errors import UserError
from mla_convert.flow import drop_prompts
from mla_convert.load import load_dense, load_source
from mla_convert.pipeline import job, run
from mla_convert.pipeline.calibration import calibration_batches
from mla_convert.pipeline.context import Context
from mla_convert.pipeline.generation import Request, generate_video
from mla_convert.pipeline.preview import preview_strip
from mla_convert.recipe.load import parse_recipe
from mla_convert.run.stream import stream_chunks

AWAY = torch.arange(96.0).view(3, 32) / 96


def write_negative(path: Path, embeds: Tensor = AWAY) -> Path:
    save_file({"prompt_embeds": embeds}, path)
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six clips with embeddings of three tokens, as a text encoder would make them."""
    generator = torch.Generator().manual_seed(0)
    clips = [Clip(torch.randn(1, 6, 16, 16, generator=generator), torch.randn(3, 32)) for _ in range(6)]
    write_latents(tmp_path / "data", clips)
    return tmp_path / "data"


def recipe(teacher: Path, data: Path, *overrides: str) -> Any:
    changes = [f"data={{kind: latents, folder: '{data}', heldout: 2}}", "generate.prompts=[]", "distill.0.steps=2"]
    return parse_recipe(RECIPE.format(teacher=teacher), [*changes, "evaluate.rollout_prompts=0", *overrides])


@pytest.mark.parametrize("leading", [(), (1,)])
def test_a_shorter_prompt_has_zeros_behind_it(tmp_path, leading):
    found = read_negative(write_negative(tmp_path / "n", torch.ones(*leading, 2, 4)), (5, 4))
    assert torch.equal(found[:2], torch.ones(2, 4)) and found.shape == (5, 4) and not found[2:].any()


@pytest.mark.parametrize("shape", [(2, 8), (6, 4), (2, 2, 4)])
def test_one_that_does_not_fit_is_named(tmp_path, shape):
    path = write_negative(tmp_path / "n", torch.ones(shape))
    with pytest.raises(UserError, match=r"negative prompt .*n has a .* tensor prompt_embeds, but prompts are \[5, 4\]"):
        read_negative(path, (5, 4))


def test_files_that_are_none(tmp_path):
    save_file({"other": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(UserError, match="has no tensor prompt_embeds"):
        read_negative(tmp_path / "other", (5, 4))
    (tmp_path / "broken").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot read the negative prompt"):
        read_negative(tmp_path / "broken", (5, 4))


def test_the_same_prompts_are_dropped_whatever_takes_their_place():
    text = 1 + torch.rand(64, 3, 4, generator=torch.Generator().manual_seed(0))
    dropped = drop_prompts(text, 0.5, torch.Generator().manual_seed(1))
    gone = (dropped == 0).all(dim=(1, 2))
    assert 16 < int(gone.sum()) < 48
    replaced = drop_prompts(text, 0.5, torch.Generator().manual_seed(1), -torch.ones(3, 4))
    assert (replaced[gone] == -1).all() and torch.equal(replaced[~gone], text[~gone])


def test_clips_have_the_one_beside_them_or_the_one_that_is_given(tmp_path, data):
    config = DataConfig(kind="latents", folder=str(data), heldout=2)
    with pytest.raises(UserError, match=rf"{data} has no {NEGATIVE}; .* set data.negative_embeds"):
        _ = open_data(config, 0).negative
    write_negative(data / NEGATIVE)
    assert torch.equal(open_data(config, 0).negative, AWAY)
    elsewhere = write_negative(tmp_path / "other.safetensors", AWAY[:2] + 1)
    found = open_data(config.model_copy(update={"negative_embeds": str(elsewhere)}), 0).negative
    assert torch.equal(found[:2], AWAY[:2] + 1) and not found[2:].any()
    assert not open_data(DataConfig(), 0).negative.any()
    with pytest.raises(ValueError, match="leave out folder, text_tokens and negative_embeds"):
        DataConfig(negative_embeds=str(elsewhere))


class Clips(case.Clips):
    @property
    def negative(self) -> Tensor:
        return AWAY


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        (MatchVelocity, {"stage": "match_velocity", "empty_prompt_rate": 1.0}),
        (Consistency, {"stage": "consistency", "guidance_scale": 3.0}),
    ],
)
def test_stages_put_it_where_a_prompt_is_not_told(tmp_path, monkeypatch, stage, settings):
    """The texts that the models get, other than those of the clips."""
    seen: list[Tensor] = []

    def dropped(text: Tensor, rate: float, generator: torch.Generator, negative: Tensor | None) -> Tensor:
        seen.append(drop_prompts(text, rate, generator, negative))
        return seen[-1]

    def guided(model: Any, clips: Any, negative: Tensor, scale: float) -> Tensor:
        seen.append(negative)
        return clips.target

    monkeypatch.setattr(noised, "drop_prompts", dropped)
    monkeypatch.setattr(consistency, "guided_velocity", guided)
    teacher = case.tiny_model()
    config = case.make_config(**settings, steps=1, warmup_steps=0)
    run_stage(config, case.perturbed(teacher), {"teacher": teacher}, Clips(), None, tmp_path, 0, 0)
    assert seen and all(torch.equal(text, AWAY.expand(2, -1, -1)) for text in seen)


def test_a_guided_preview_leads_away_from_it(tmp_path):
    seen = []

    def picture(student: Any, config: Any, heldout: Any, negative: Tensor) -> Any:
        seen.append(negative)
        return preview_strip(student, config, heldout, negative)

    teacher, preview = case.tiny_model(), {"every": 1, "clips": 1, "num_inference_steps": 1, "guidance_scale": 2.0}
    config = case.make_config(steps=1, warmup_steps=0, preview=preview)
    clips, networks = Clips(), {"teacher": teacher}
    student = case.perturbed(teacher)
    run_stage(config, student, networks, clips, clips.heldout(), tmp_path, 0, 0, picture=picture)
    assert len(seen) == 1 and torch.equal(seen[0], AWAY)
    strips = [preview_strip(student, config.preview, clips.heldout(), negative) for negative in (AWAY, None)]
    assert not (strips[0] == strips[1]).all()


@pytest.mark.parametrize(
    "setting",
    [
        "convert.calibration.empty_prompt_rate=0.5",
        "distill.0.empty_prompt_rate=0.5",
        "distill.0.preview={every: 1, guidance_scale: 2.0}",
    ],
)
def test_a_run_without_one_ends_before_it_begins(teacher, data, tmp_path, setting):
    with pytest.raises(UserError, match=f"has no {NEGATIVE}"):
        run(recipe(teacher, data, setting), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_calibration_has_it(teacher, data, tmp_path):
    write_negative(data / NEGATIVE)
    chosen = recipe(teacher, data, "convert.calibration.empty_prompt_rate=0.5", "distill.0.empty_prompt_rate=0.5")
    batches = list(calibration_batches(Context(chosen, tmp_path, lambda *told: None), tmp_path))
    assert len(batches) == 2 and all(torch.equal(batch.negative, AWAY) for batch in batches)
    assert run(chosen, tmp_path / "run", until="distill").model.exists()


def test_a_teacher_rolls_out_away_from_it(teacher, tmp_path):
    text = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(2))
    (tmp_path / "prompts").mkdir()
    save_file({"prompt_embeds": text}, tmp_path / "prompts" / "prompts-00000.safetensors")
    clips = (
        "data={kind: rollouts, heldout: 2, rollouts: {clips: 4, num_frames: 3, batch_size: 2, num_inference_steps: 2, "
        f"guidance_scale: 2.0, prompt_embeds: '{tmp_path / 'prompts'}'}}}}"
    )
    chosen = recipe(teacher, tmp_path, clips)
    with pytest.raises(UserError, match=f"guidance_scale needs a negative prompt, and .* has no {NEGATIVE}"):
        run(chosen, tmp_path / "run")
    assert not (tmp_path / "run").exists()

    write_negative(tmp_path / "prompts" / NEGATIVE)
    run(chosen, tmp_path / "run", until="data")

    made = LatentShards(tmp_path / "run" / "data").read(0)["latents"]
    dense = load_dense(load_source(str(teacher)))
    seed = drawn_seed(Use.ROLLOUT, 0, 0)
    chunks = stream_chunks(
        dense, text, 3, 16, 16, num_inference_steps=2, guidance_scale=2.0, seed=seed, negative_hidden_states=AWAY[None]
    )
    assert torch.equal(made, torch.cat(list(chunks), dim=2)[0])
    assert torch.equal(open_data(chosen.data.made_in(tmp_path / "run" / "data"), 0).negative, AWAY)


@pytest.fixture
def told(monkeypatch) -> list[Tensor | None]:
    """The negative prompts in the rollouts of `generate`."""
    seen: list[Tensor | None] = []
    rollout = job.rollout

    def watched(*inputs: Any, negative_hidden_states: Tensor | None, **more: Any) -> Any:
        seen.append(negative_hidden_states)
        return rollout(*inputs, negative_hidden_states=negative_hidden_states, **more)

    monkeypatch.setattr(job, "rollout", watched)
    return seen


def test_generate_takes_the_one_beside_the_prompt(teacher, tmp_path, told):
    embeds = write_negative(tmp_path / "prompt.safetensors", torch.ones(3, 32))
    settings = {"num_frames": 3, "num_inference_steps": 1, "guidance_scale": 2.0}

    def make(name: str, **request: Any) -> Tensor:
        generate_video(teacher, tmp_path / name, Request(prompt_embeds=embeds, **request), settings, lambda *_: None)
        return load_file(tmp_path / name)["latents"]

    empty = make("a.safetensors")
    write_negative(tmp_path / NEGATIVE)
    beside = make("b.safetensors")
    given = make("c.safetensors", negative_embeds=write_negative(tmp_path / "given", AWAY[:1]))
    assert told[0] is None
    assert torch.equal(told[1], AWAY[None]) and torch.equal(told[2][0, :1], AWAY[:1]) and not told[2][0, 1:].any()
    assert len({float(video.sum()) for video in (empty, beside, given)}) == 3
