"""A digits recipe that runs in seconds on a random model, and a way to run it in a separate process."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch

from mla_convert.families.wan import CausalWanTransformer3DModel
from mla_convert.recipe.load import parse_recipe
from mla_convert.zoo.digits.data import TEXT_DIM

RECIPE = """
version: 1
name: pico
source:
  model: {teacher}
data:
  kind: digits
  heldout: 4
convert:
  kv_lora_rank: 8
  calibration:
    clips: 4
    batch_size: 2
distill:
  - stage: match_velocity
    steps: 6
    learning_rate: 1e-3
    batch_size: 2
    trainable: attention
    ema_decay: 0.9
    checkpoint_every: 2
    tracker: null
evaluate:
  clips: 4
  batch_size: 2
  rollout_prompts: 2
  long_factor: 0
  num_inference_steps: 1
generate:
  prompts: [7 moving up-left]
  num_frames: 4
  num_inference_steps: 1
  fps: 4
export:
  dtype: bfloat16
"""


def write_teacher(folder: Path, seed: int = 0) -> Path:
    """A random dense digits model: two layers with two heads of twelve channels."""
    torch.manual_seed(seed)
    model = CausalWanTransformer3DModel(
        patch_size=(1, 4, 4),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=1,
        out_channels=1,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        causal={"num_frames_per_block": 3, "window_frames": 9, "sink_frames": 3},
    )
    model.save_pretrained(folder)
    return folder


def write_recipe(path: Path, teacher: Path) -> Path:
    path.write_text(RECIPE.format(teacher=teacher))
    return path


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file by its path in `folder`."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run_recipe(teacher: Path, folder: Path) -> None:
    """Start or continue a run; the body of a process that the tests kill."""
    from mla_convert.pipeline import run

    torch.set_num_threads(1)
    sys.stderr = (folder.parent / "stderr.txt").open("a")
    run(parse_recipe(RECIPE.format(teacher=teacher)), folder, resume=True)
