"""A run of a latent-space model generates its prompts: text encoder, teacher and student side by side, VAE, report."""

from __future__ import annotations

from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pico
import pytest
import torch
from safetensors.torch import load_file
from wan_pipeline_case import DIM, write_wan_pipeline

from mla_convert.distill.clip_shards import Clip, write_latents
from mla_convert.errors import UsageError
from mla_convert.pipeline import run
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
  latents: normalised
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
  latent_height: 4
  latent_width: 6
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
