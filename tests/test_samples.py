"""A run of a latent-space model generates its prompts: text encoder, teacher and student side by side, VAE, report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pico
import pytest
import torch
from recipe_case import RECIPE as DIGITS
from safetensors.torch import load_file
from wan_pipeline_case import DIM, write_wan_pipeline

from mla_convert.cli import main
from mla_convert.distill.clip_shards import Clip, write_latents
from mla_convert.errors import UsageError, UserError
from mla_convert.pipeline import run
from mla_convert.pipeline.context import Context
from mla_convert.recipe.load import parse_recipe

RECIPE = """
version: 1
name: drawn
source:
  model: {model}
causal: {{num_frames_per_block: 1, window_frames: 4}}
data:
  kind: latents
  folder: {data}
  latents: normalized
  heldout: 2
convert:
  init: svd
  kv_lora_rank: 8
evaluate: {{clips: 2, batch_size: 2, rollout_prompts: 0, long_factor: 0}}
generate:
  prompts: ["a cat, 'walking' / slowly", a dog]
  num_frames: 3
  num_inference_steps: 1
  guidance_scale: 2.0
  fps: 8
"""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_wan_pipeline(tmp_path_factory.mktemp("pipeline"))
    pico.dense_model(in_channels=4, out_channels=4, text_dim=DIM, causal=None).save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, generator = tmp_path_factory.mktemp("data"), torch.Generator().manual_seed(0)
    shapes = (4, 3, 4, 6), (512, DIM)
    clips = [Clip(*(torch.randn(shape, generator=generator) for shape in shapes), name=f"{n}") for n in range(4)]
    write_latents(folder, clips, 4)
    return folder


def test_prompts_become_videos_of_both_models(pipeline: Path, data: Path, tmp_path: Path) -> None:
    run(parse_recipe(RECIPE.format(model=pipeline, data=data)), tmp_path / "run")
    # Nothing in the recipe says how large the clips are.
    samples = tmp_path / "run" / "samples"
    names = ["00-a-cat-walking-slowly.mp4", "01-a-dog.mp4", "rollouts.safetensors"]
    assert sorted(path.name for path in samples.iterdir()) == names
    videos = load_file(samples / "rollouts.safetensors")
    assert videos["teacher"].shape == videos["student"].shape == (2, 4, 3, 4, 6)
    assert not torch.equal(videos["teacher"], videos["student"])
    reader = imageio_ffmpeg.read_frames(str(samples / names[0]))
    size = next(reader)["size"]
    frames = [np.frombuffer(frame, np.uint8).reshape(size[1], size[0], 3) for frame in reader]
    # One video frame and then four for every latent one.
    assert len(frames) == 9
    assert np.ptp(frames[-1]) > 50
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:video/mp4") == 2
    assert "a dog" in page
    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    again = tmp_path / "again"
    assert main(["evaluate", str(tmp_path / "run" / "stages" / "00-convert"), "--out", str(again)]) == 0
    assert json.loads((again / "report.json").read_text(encoding="utf-8"))["plan"] == report["plan"]
    assert report["plan"]["tokens_per_frame"] == 4 // 2 * 6 // 2
    sampling = json.loads((tmp_path / "run" / "checkpoint" / "model_index.json").read_text())["sampling"]
    assert (sampling["latent_height"], sampling["latent_width"]) == (4, 6)


def test_prompts_that_nobody_can_read_are_refused_before_anything(pipeline: Path, data: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    pico.dense_model(in_channels=4, out_channels=4, text_dim=DIM, causal=None).save_pretrained(alone)
    recipe = parse_recipe(RECIPE.format(model=alone, data=data).replace("a dog", "狗" * 90))
    message = r"generate\.prompts: .*alone has no tokenizer and text_encoder and vae; set source\.components to a"
    with pytest.raises(UsageError, match=message):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with_parts = recipe.model_copy(update={"source": recipe.source.model_copy(update={"components": str(pipeline)})})
    run(with_parts, tmp_path / "run")
    # A file name has at most 255 bytes, of which one of these characters takes three.
    assert (tmp_path / "run" / "samples" / f"01-{'狗' * 50}.mp4").exists()


def test_a_size_in_the_recipe_comes_before_that_of_the_clips(pipeline: Path, data: Path, tmp_path: Path) -> None:
    recipe = parse_recipe(RECIPE.format(model=pipeline, data=data), ["generate.latent_height=8"])
    context = Context(recipe, tmp_path, lambda *_: None)
    assert (context.generate.latent_height, context.generate.latent_width) == (8, 6)
    digits = parse_recipe(DIGITS.format(teacher="zoo:digits"))
    assert Context(digits, tmp_path, lambda *_: None).generate == digits.generate


def test_clips_that_are_gone_had_the_size_that_the_run_has_kept(pipeline: Path, data: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    recipe = parse_recipe(RECIPE.format(model=pipeline, data=moved))
    before = Context(recipe, tmp_path, lambda *_: None)
    assert before.generate.latent_width == 6
    before.keep_index()
    shutil.rmtree(moved)
    assert Context(recipe, tmp_path, lambda *_: None).generate == before.generate
    with pytest.raises(UserError, match=r"no \.parquet shards"):
        _ = Context(recipe, tmp_path / "other", lambda *_: None).generate
