"""Clips with images: `encode` stores the same condition as in generation; readers return what models need."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import image_case as case
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_encode import clips, encode
from test_encode import pipeline as text_pipeline

from mla_convert.distill.clip_shards import Clip, write_latents, write_shard
from mla_convert.distill.data import DataConfig, open_data
from mla_convert.distill.encode.frames import read_frames
from mla_convert.distill.encode.models import image_encoder, load_vae
from mla_convert.distill.latents import LatentShards
from mla_convert.distill.normalization import WAN21, notes_of
from mla_convert.errors import UserError
from mla_convert.run.image import ImageLatents

__all__ = ["clips", "text_pipeline"]
BOTH = ("image_latents", "encoder_hidden_states_image")
FLOAT32 = 1e-5


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with an image encoder, like Wan2.1's."""
    return case.write_pipeline(tmp_path_factory.mktemp("pipeline"))


def test_what_is_stored_is_what_generation_makes_of_the_first_frame(
    clips: Path, pipeline: Path, tmp_path: Path, capsys: Any
) -> None:
    options = ["--image-condition", "--dtype", "float32", "--batch-size", "2", "--shard-size", "5", "--json"]
    for kind in ("normalized", "raw"):
        assert encode(clips, tmp_path / kind, pipeline, *options, "--latents", kind) == 0
        result = json.loads(capsys.readouterr().out)
        assert [result[name] for name in BOTH] == [[8, 3, 6, 8], [5, 8]]
    read, raw = (LatentShards(tmp_path / kind, conditions=BOTH) for kind in ("normalized", "raw"))
    paths = sorted(clips.rglob("*.mp4"), key=lambda path: path.relative_to(clips).as_posix())
    vae = load_vae(pipeline)
    with image_encoder(pipeline, torch.device("cpu")) as embed:
        for number, path in enumerate(paths):
            image, clip = Image.fromarray(read_frames(path, 9, 48, 64, 16)[0].numpy()), read.read(number)
            # Observed: 0, and 0.
            expected = ImageLatents(vae, image, 6, 8, 3)(0, 3)[0]
            torch.testing.assert_close(clip["image_latents"], expected, rtol=0, atol=FLOAT32)
            torch.testing.assert_close(clip["encoder_hidden_states_image"], embed(image)[0], rtol=0, atol=FLOAT32)
            # The encoder is causal. Observed: 3.9e-7.
            torch.testing.assert_close(clip["latents"][:, 0], expected[4:, 0], rtol=0, atol=FLOAT32)
            assert torch.equal(raw.read(number)["image_latents"], clip["image_latents"])
    fields = [field.name for field in pq.read_schema(tmp_path / "raw" / "shard-00000.parquet")]
    assert fields[7:14:3] == ["first_frame_latent_bytes", "clip_feature_bytes", "file_name"]


def test_a_pipeline_without_an_image_encoder_gives_latents_alone(
    clips: Path, text_pipeline: Path, tmp_path: Path, capsys: Any
) -> None:
    assert encode(clips, tmp_path / "data", text_pipeline, "--image-condition", "--shard-size", "3") == 0
    assert "from each first frame: image latents 8x3x6x8" in capsys.readouterr().out
    assert LatentShards(tmp_path / "data", conditions=["image_latents"]).read(0)["image_latents"].shape == (8, 3, 6, 8)
    with pytest.raises(UserError, match="hold no clip_feature; encode the videos with `mla-convert encode --image-con"):
        LatentShards(tmp_path / "data", conditions=BOTH)
    # A killed run goes on with the same setting, and with no other.
    before = (tmp_path / "data" / "shard-00001.parquet").read_bytes()
    (tmp_path / "data" / "shard-00001.parquet").unlink()
    assert encode(clips, tmp_path / "data", text_pipeline, "--shard-size", "3", "--resume") == 2
    assert "began with image_condition True, not False" in capsys.readouterr().err
    assert encode(clips, tmp_path / "data", text_pipeline, "--image-condition", "--shard-size", "3", "--resume") == 0
    assert (tmp_path / "data" / "shard-00001.parquet").read_bytes() == before
    assert encode(None, tmp_path / "x", text_pipeline, "--prompts", "a.txt", "--image-condition") == 2
    assert "--image-condition encodes the first frames of VIDEOS; leave it out" in capsys.readouterr().err


def made(count: int = 4, frames: int = 8, stored: int | None = None, seed: int = 0) -> Iterator[Clip]:
    """Random clips whose images begin as they do; `stored` latent frames of the images are kept."""
    for number in range(seed, seed + count):
        latents = case.latents(frames, seed=number)[0][0]
        given = {name: x[0] for name, x in case.conditions("wan2.1", frames, seed=100 + number).items()}
        image = given["image_latents"]
        image[:4], image[:4, 0], image[4:, 0] = 0, 1, latents[:, 0]
        given["image_latents"] = image[:, :stored]
        yield Clip(latents, case.text("wan2.1", seed=number)[0], conditions=given)


def test_conditions_come_back_by_the_names_of_the_model(tmp_path: Path) -> None:
    write_latents(tmp_path, made(), clips_per_shard=3)
    data = open_data(DataConfig(kind="latents", folder=str(tmp_path), heldout=2, split="last"), 0, BOTH)
    for index, clip in enumerate(made(2)):
        example = data.example(index)
        assert list(example) == ["latents", "encoder_hidden_states", *BOTH]
        assert all(torch.equal(example[name], clip.conditions[name]) for name in BOTH)
    held = data.heldout()
    assert {name: len(x) for name, x in held.items()} == dict.fromkeys(held, 2)
    only = LatentShards(tmp_path, conditions=["image_latents"]).read(0)
    assert list(only) == ["latents", "encoder_hidden_states", "image_latents"]


def test_frames_behind_the_stored_ones_are_like_the_last(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", made(stored=3), notes=notes_of(None))
    image = LatentShards(tmp_path, conditions=BOTH).read(0)["image_latents"]
    assert image.shape == (8, 8, 4, 6)
    assert torch.equal(image[4:, :3], next(made()).conditions["image_latents"][4:, :3])
    assert all(torch.equal(image[:, frame], image[:, 2]) for frame in range(3, 8))


def test_a_text_to_video_model_leaves_images_out_and_says_so_once(tmp_path: Path, caplog: Any) -> None:
    write_latents(tmp_path / "images", made(), clips_per_shard=2)
    plain = (Clip(clip.latents, clip.encoder_hidden_states) for clip in made())
    write_latents(tmp_path / "plain", plain, clips_per_shard=2)
    with caplog.at_level(logging.WARNING):
        read = [LatentShards(tmp_path / "images").read(0) for _ in range(2)]
        expected = LatentShards(tmp_path / "plain").read(0)
    assert list(read[0]) == list(expected) and all(torch.equal(read[0][name], x) for name, x in expected.items())
    assert [record.message.partition(" in ")[0] for record in caplog.records] == ["the clips"]
    assert "hold images, but the model takes none; they are not read" in caplog.text


def theirs(raw: bool = True, normalized: bool = True, **changes: Any) -> list[dict[str, Any]]:
    """Rows as FastVideo writes them: raw latents from the VAE, but normalized ones of the first frame."""
    mean, std = (torch.tensor(part).view(-1, 1, 1, 1) for part in WAN21)
    found = []
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        latents, image = torch.randn(2, 16, 3, 4, 6, generator=generator)
        image[:, 0] = latents[:, 0] + 0.01
        tokens = torch.randn(257, 8, generator=generator)
        tensors = {
            "vae_latent": latents * std + mean if raw else latents,
            "text_embedding": torch.zeros(512, 8),
            "clip_feature": tokens,
            "first_frame_latent": image if normalized else image * std + mean,
            **changes,
        }
        row: dict[str, Any] = {"id": str(number), "file_name": str(number)}
        for name, x in tensors.items():
            row |= {
                f"{name}_bytes": x.numpy().tobytes() if x.numel() else b"",
                f"{name}_shape": list(x.shape) if x.numel() else [],
            }
            row[f"{name}_dtype"] = "float32" if x.numel() else ""
        found.append(row)
    return found


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """FastVideo puts many clips into a row group."""
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")
    return folder


def test_the_shards_of_fastvideo_are_read(tmp_path: Path) -> None:
    read = LatentShards(written(tmp_path / "theirs", theirs()), latents="raw", conditions=BOTH)
    for number, (clip, row) in enumerate(zip(map(read.read, range(4)), theirs(raw=False), strict=True)):
        for name, column in (("latents", "vae_latent"), ("encoder_hidden_states_image", "clip_feature")):
            expected = torch.frombuffer(bytearray(row[f"{column}_bytes"]), dtype=torch.float32)
            torch.testing.assert_close(clip[name].flatten(), expected, rtol=0, atol=FLOAT32), number
        image = torch.frombuffer(bytearray(row["first_frame_latent_bytes"]), dtype=torch.float32).view(16, 3, 4, 6)
        assert torch.equal(clip["image_latents"][4:], image)
        assert clip["image_latents"][:4, 0].eq(1).all() and clip["image_latents"][:4, 1:].eq(0).all()


NOTHING = torch.zeros(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalized": False}, "does not begin like its vae_latent: it is not normalized, or is of another image"),
        (
            {"first_frame_latent": torch.zeros(16, 1, 4, 6)},
            "first_frame_latent of 16x1x4x6, which does not match its latents of 16x3x4x6",
        ),
        (
            {"first_frame_latent": torch.zeros(20, 3, 4, 6)},
            "first_frame_latent of 20x3x4x6, which does not match its latents of 16x3x4x6",
        ),
        ({"clip_feature": NOTHING}, "hold no clip_feature; encode the videos with `mla-convert encode --image-conditi"),
        ({"first_frame_latent": NOTHING, "clip_feature": NOTHING}, "hold no first_frame_latent and clip_feature;"),
    ],
)
def test_images_that_are_not_what_models_read_are_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = written(tmp_path / "theirs", theirs(**changes))
    with pytest.raises(UserError) as error:
        LatentShards(folder, latents="raw", conditions=BOTH)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert LatentShards(folder, latents="raw").read(0).keys() == {"latents", "encoder_hidden_states"}


def test_clips_with_and_without_images_are_not_mixed(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", made(2))
    write_shard(tmp_path / "b.parquet", (Clip(clip.latents, clip.encoder_hidden_states) for clip in made(2)))
    with pytest.raises(UserError, match=r"clip 0 of .*b\.parquet has no first_frame_latent, but other clips have one"):
        LatentShards(tmp_path, conditions=BOTH)


def test_an_image_that_is_not_finite_is_named(tmp_path: Path) -> None:
    clip = next(made())
    clip.conditions["encoder_hidden_states_image"][2, 3] = float("nan")
    write_shard(tmp_path / "a.parquet", [clip, *made(1, seed=7)])
    read = LatentShards(tmp_path, conditions=BOTH)
    with pytest.raises(UserError, match=r"has NaN or infinite values in its clip_feature; .* data.skip: \[0\]"):
        read.read(0)


def test_digits_have_no_images() -> None:
    with pytest.raises(UserError, match=r"is conditioned on an image, and data\.kind: digits has none; set kind"):
        open_data(DataConfig(), 0, BOTH)
