"""The first latent of a scored window that has moved: an image's, by the VAE, in a stage, a run and a dry run."""

from __future__ import annotations

import copy
import functools
import shutil
from pathlib import Path
from typing import Any

import distill_case as case
import pytest
import torch
from diffusers import AutoencoderKLWan
from pretend_gpu import GPU, pretended
from test_decode import latents, tiny_vae
from test_samples import RECIPE, data, pipeline  # noqa: F401

from mla_convert.distill.encode.models import encode_pixels
from mla_convert.distill.footprint import Launch
from mla_convert.distill.metrics import Metrics
from mla_convert.distill.stages.dmd import DMD
from mla_convert.errors import UserError
from mla_convert.pipeline import run, steps
from mla_convert.pipeline.dry_run import DryRun
from mla_convert.pipeline.vae import reencoding_bytes
from mla_convert.recipe.load import parse_recipe
from mla_convert.run.reencode import image_latent
from mla_convert.run.video import denormalized

MOVED = {"rollout_frames": 12, "score_frames": 6}
STAGE = "{stage: dmd, steps: 1, learning_rate: 1e-3, batch_size: 1, denoising_steps: [1000], critic_updates: 1, "
STAGE += "guidance_scale: 1, rollout_frames: 4, score_frames: 2, tracker: null, reencode_first: true}"


@pytest.mark.parametrize("name", ["wan2.1", "wan2.2"])
def test_it_is_the_last_decoded_frame_encoded_as_an_image(name: str) -> None:
    vae, video = tiny_vae(name), latents(frames=4)
    with torch.no_grad():
        pixels = vae.decode(denormalized(vae, video)).sample
    assert pixels.shape[2] == 13
    expected = encode_pixels(vae, pixels[:, :, -1:])
    with torch.autocast("cpu", torch.bfloat16):
        actual = image_latent(vae, video)
    assert actual.shape == video[:, :, -1:].shape
    # As in `test_decode`, of latents up to 2. Observed: 2e-6.
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)
    with pretended():
        there = image_latent(copy.deepcopy(vae), video.to(GPU))
        assert there.device == GPU
        torch.testing.assert_close(there.cpu(), expected, rtol=0, atol=2e-5)


def test_only_a_window_that_has_moved_begins_with_it() -> None:
    student, batch, seen = case.tiny_model(), case.Clips().heldout(), []

    def encode(videos: torch.Tensor) -> torch.Tensor:
        seen.append(videos)
        return torch.full_like(videos[:, :, -1:], 7.0)

    def scored(reencode: bool, drawn: float) -> tuple[torch.Tensor, int]:
        stage = DMD(case.make_config("dmd", score_window="random", reencode_first=reencode, **MOVED))
        stage.image_latent, stage._window_draw = encode, drawn
        return stage._rollout(student, batch, torch.Generator().manual_seed(0))

    plain, _ = scored(False, 0.99)
    videos, unscored = scored(True, 0.99)
    assert unscored == 3 and len(seen) == 1 and seen[0].shape[2] == 7 and not seen[0].requires_grad
    assert torch.equal(seen[0][:, :, -1:], plain[:, :, :1]) and torch.equal(videos[:, :, 1:], plain[:, :, 1:])
    assert (videos[:, :, :1] == 7).all()
    (bias,) = torch.autograd.grad(videos[:, :, 3:].sum(), [student.proj_out.bias])
    assert bias.any()
    _, unscored = scored(True, 0.0)
    assert unscored == 0 and len(seen) == 1


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reencode_first needs a VAE, which this run does not have"):
        case.train(tmp_path, stage="dmd", reencode_first=True, **MOVED)
    with pytest.raises(UserError, match="reencode_first: every scored window begins with the video"):
        case.train(tmp_path, stage="dmd", reencode_first=True)
    assert not list(tmp_path.iterdir())


def test_a_run_takes_the_vae_of_its_source(
    pipeline: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called, run_stage = [], steps.run_stage

    def watched(*given: Any) -> Any:
        *others, encode = given
        assert isinstance(encode, functools.partial) and encode.func is image_latent
        return run_stage(*others, lambda videos: called.append(videos.shape[2]) or encode(videos))

    monkeypatch.setattr(steps, "run_stage", watched)
    recipe = parse_recipe(RECIPE.format(model=pipeline, data=data), [f"distill=[{STAGE}]"])
    run(recipe, tmp_path / "run", until="distill")
    # The window of frames 2 and 3, of the fake score's update and of the student's.
    assert called == [3, 3]
    assert [row["step"] for row in Metrics(tmp_path / "run/training/01-dmd/metrics.jsonl").rows()] == [0, 1]
    (need,) = DryRun(recipe, Launch()).needs()
    vae = AutoencoderKLWan.from_pretrained(pipeline / "vae")
    weights = 4 * sum(weight.numel() for weight in vae.parameters())
    assert need.memory["vae"] == reencoding_bytes(vae.config, 4, 6) > weights
    (without,) = DryRun(parse_recipe(recipe.dump(), ["distill.0.reencode_first=false"]), Launch()).needs()
    assert without.memory == {**need.memory, "vae": 0}


def test_a_dry_run_of_a_source_elsewhere_counts_and_times_without_its_vae(
    pipeline: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    shutil.copy(pipeline / "transformer" / "config.json", tmp_path)
    run = DryRun(parse_recipe(RECIPE.format(model=tmp_path, data=data), [f"distill=[{STAGE}]"]), Launch())
    (need,) = run.needs()
    assert need.memory["vae"] == 0 and "the VAE is not counted, nor is encoding timed" in " ".join(run.assumptions)
    assert len(run.measure(1)) == 1


def test_a_source_without_its_vae_is_refused_before_anything(
    pipeline: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    alone, wide = tmp_path / "alone", tmp_path / "wide"
    (wide / "vae").mkdir(parents=True)
    AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1]).save_config(wide / "vae")
    alone.mkdir()
    (alone / "transformer").symlink_to(pipeline / "transformer")
    for place, components, message in (
        (alone, None, "has no VAE; set source.components"),
        ("zoo:natural", None, "makes pixels"),
        # A pipeline is asked for, which its transformer is not, although that lies beside a VAE.
        (pipeline, pipeline / "transformer", "has no vae; give the folder or Hub ID of a complete pipeline"),
        (pipeline, wide, "has latents of 16 channels, but the model makes 4; set source.components"),
    ):
        changes = [f"distill=[{STAGE}]", "generate.prompts=[]", "convert.init=svd", f"source.components={components}"]
        recipe = parse_recipe(RECIPE.format(model=place, data=data), changes if components else changes[:-1])
        with pytest.raises(UserError, match=rf"distill\.0: .*{message}"):
            run(recipe, tmp_path / "run")
        with pytest.raises(UserError, match=message):
            DryRun(recipe, Launch()).needs()
    assert not (tmp_path / "run").exists()


def test_a_dry_run_takes_wan21s_vae_for_one_that_is_not_here_only_if_it_fits(
    pipeline: Path,  # noqa: F811
    data: Path,  # noqa: F811
) -> None:
    changes = [f"distill=[{STAGE}]", "source.components=owner/name"]
    recipe = parse_recipe(RECIPE.format(model=pipeline, data=data), changes)
    planned = DryRun(recipe, Launch())
    (need,) = planned.needs()
    assert need.memory["vae"] == 0
    assert planned.assumptions == ["the VAE is not counted, nor is encoding timed; the source's is not on this machine"]
    planned = DryRun(recipe, Launch())
    planned.config["out_channels"] = 16
    assert planned.vae == {}
    assert planned.assumptions == ["the VAE is Wan2.1's; the source's is not on this machine"]
