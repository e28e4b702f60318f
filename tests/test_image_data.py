"""Clips with images: what `encode` stores of a first frame is what generation makes of it, and models read it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import image_case as case
import numpy as np
import pico
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from recipe_case import digests
from test_encode import DIM, clips, encode, rows
from torch import Tensor

from mla_convert.cli import main
from mla_convert.distill import latents as shards_module
from mla_convert.distill.data import DataConfig, open_data
from mla_convert.distill.encode.frames import read_frames
from mla_convert.distill.encode.models import image_encoder, load_vae
from mla_convert.distill.latents import Clip, LatentShards, write_latents, write_shard
from mla_convert.distill.normalisation import WAN21
from mla_convert.errors import UserError
from mla_convert.run.image import ImageLatents

__all__ = ["clips"]
BOTH = ("image_latents", "encoder_hidden_states_image")
FLOAT32 = 1e-5


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with an image encoder, as Wan2.1's."""
    return case.write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def encoded(clips: Path, pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven clips of 9 frames of 48x64 pixels with images, in float32."""
    out = tmp_path_factory.mktemp("encoded") / "data"
    options = ["--image-condition", "--dtype", "float32", "--shard-size", "3"]
    assert encode(clips, out, pipeline, *options) == 0
    return out


def test_what_is_stored_is_what_generation_makes_of_the_first_frame(
    clips: Path, pipeline: Path, encoded: Path
) -> None:
    read = LatentShards(encoded, conditions=BOTH)
    assert [field.name for field in pq.read_schema(encoded / "shard-00000.parquet")][7:13] == [
        f"{column}_{part}" for column in ("first_frame_latent", "clip_feature") for part in ("bytes", "shape", "dtype")
    ]
    vae = load_vae(pipeline)
    with image_encoder(pipeline, torch.device("cpu")) as embed:
        for number, path in enumerate(sorted(clips.rglob("*.mp4"), key=lambda path: path.name)):
            frame = read_frames(path, 9, 48, 64, 16)[0]
            image = Image.fromarray(frame.numpy())
            clip = next(c for c in map(read.read, range(7)) if torch.equal(c["latents"], read.read(number)["latents"]))
            expected = ImageLatents(vae, image, 6, 8, 3)(0, 3)[0]
            # Observed: 0.
            torch.testing.assert_close(clip["image_latents"], expected, rtol=0, atol=FLOAT32)
            torch.testing.assert_close(clip["encoder_hidden_states_image"], embed(image)[0], rtol=0, atol=FLOAT32)
