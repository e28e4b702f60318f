"""`encode` compared with the models it wraps: a tiny Wan pipeline in a folder, and videos of a moving square."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pico
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from launched import launched
from recipe_case import RECIPE, digests
from wan_pipeline_case import DIM, write_wan_pipeline

from mla_convert.cli import main
from mla_convert.distill.data import DataConfig, open_data
from mla_convert.distill.encode import videos as video_shards
from mla_convert.distill.encode.frames import UnusableVideo, ahead, read_frames, to_pixels
from mla_convert.distill.encode.models import text_encoder
from mla_convert.distill.encode.sources import TABLES, find_videos, read_prompts
from mla_convert.distill.latents import LatentShards
from mla_convert.distill.negative import WAN_NEGATIVE_PROMPT
from mla_convert.errors import UserError
from mla_convert.pipeline import run
from mla_convert.recipe.load import parse_recipe
from mla_convert.run.sample import load_prompt_embeds, prompt_files
from mla_convert.run.video import save_video

FRAMES, HEIGHT, WIDTH = 9, 48, 64
CAPTIONS = [
    "a red square",
    "a red  square moves &amp; moves over the dark",
    "the square",
    "dark",
    "moves \n over",
    "a",
    "over the red",
]
SIZE = ["--frames", str(FRAMES), "--height", str(HEIGHT), "--width", str(WIDTH)]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return write_wan_pipeline(tmp_path_factory.mktemp("pipeline"))


def stock_pipeline(folder: Path, dtype: torch.dtype) -> WanPipeline:
    absent = dict.fromkeys(("vae", "scheduler", "transformer", "transformer_2"))
    return WanPipeline.from_pretrained(folder, **absent, dtype=dtype)


def square(frames: int, height: int = 64, width: int = 96) -> np.ndarray:
    video = np.full((frames, height, width, 3), 0.2, dtype=np.float32)
    for i in range(frames):
        video[i, 20:40, 2 * i : 2 * i + 20] = [0.9, 0.3, 0.1]
    return video


def write_video(path: Path, frames: int = FRAMES + 2, fps: float = 16, **size: int) -> Path:
    save_video(square(frames, **size), path, fps, min_pixels=1)
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Seven videos with captions, some in a subfolder."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "more").mkdir()
    for number, caption in enumerate(CAPTIONS):
        path = folder / ("more" if number > 4 else "") / f"v{number}.mp4"
        write_video(path, FRAMES + number).with_suffix(".txt").write_text(caption)
    return folder


def encode(source: Path | None, out: Path, pipeline: Path, *options: str) -> int:
    sources = [] if source is None else [str(source), *SIZE]
    return main(["encode", *sources, "--out", str(out), "--components", str(pipeline), *options])


@pytest.fixture(scope="module")
def encoded(clips, pipeline, tmp_path_factory) -> Path:
    """The output of an uninterrupted run: three shards."""
    out = tmp_path_factory.mktemp("encoded") / "data"
    assert encode(clips, out, pipeline, "--shard-size", "3") == 0
    return out


def rows(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_latents_are_those_of_the_vae(clips, pipeline, tmp_path):
    assert encode(clips, tmp_path / "data", pipeline, "--dtype", "float32", "--batch-size", "2") == 0
    vae = AutoencoderKLWan.from_pretrained(pipeline / "vae").eval()
    mean, std = (torch.tensor(vae.config[key]).view(-1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    data = open_data(DataConfig(kind="latents", folder=str(tmp_path / "data"), heldout=1, split="last"), seed=0)
    entries = find_videos(clips)
    for index, entry in enumerate(entries[:-1]):
        pixels = to_pixels(read_frames(entry.path, FRAMES, HEIGHT, WIDTH, 16))
        with torch.no_grad():
            expected = (vae.encode(pixels.unsqueeze(0)).latent_dist.mode()[0] - mean) / std
        latents = data.example(index)["latents"]
        assert latents.shape == (4, 3, HEIGHT // 8, WIDTH // 8)
        # Observed: 6.6e-7, from batches of two.
        assert pico.relative_error(latents, expected) < 1e-5


def test_raw_latents_say_how_they_are_normalized(clips, pipeline, tmp_path, capsys):
    for kind in ("raw", "normalized"):
        assert encode(clips, tmp_path / kind, pipeline, "--dtype", "float32", "--latents", kind) == 0
        assert f"{kind} latents 4x3x6x8" in " ".join(capsys.readouterr().out.split())
    stored, other = rows(tmp_path / "raw")[0], rows(tmp_path / "normalized")[0]
    assert stored["vae_latent_bytes"] != other["vae_latent_bytes"]
    read, expected = (LatentShards(tmp_path / kind).read(0)["latents"] for kind in ("raw", "normalized"))
    # Observed: 6.1e-8.
    assert pico.relative_error(read, expected) < 1e-6
    capsys.readouterr()
    assert encode(clips, tmp_path / "raw", pipeline, "--dtype", "float32", "--resume") == 2
    assert "began with latents raw" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embeddings_are_those_of_the_stock_pipeline(clips, pipeline, encoded, tmp_path, dtype):
    out = encoded
    if dtype == "float32":
        out = tmp_path / "data"
        assert encode(clips, out, pipeline, "--dtype", dtype) == 0
    stock = stock_pipeline(pipeline, getattr(torch, dtype))
    captions = [row["caption"] for row in rows(out)]
    assert sorted(captions) == sorted(CAPTIONS)
    data = open_data(DataConfig(kind="latents", folder=str(out), heldout=1, split="last"), seed=0)
    for index, caption in enumerate(captions[:-1]):
        with torch.no_grad():
            (expected,), _ = stock.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=512)
        embedding = data.example(index)["encoder_hidden_states"]
        assert embedding.shape == (512, DIM)
        assert torch.equal(embedding, expected.float())
        assert embedding[0].any() and not embedding[40:].any()
    with torch.no_grad():
        (expected,), _ = stock.encode_prompt(
            WAN_NEGATIVE_PROMPT, do_classifier_free_guidance=False, max_sequence_length=512
        )
    assert expected.any() and torch.equal(data.negative, expected.float())


def test_rows_describe_the_clip(encoded):
    row = rows(encoded)[0]
    assert (row["id"], row["file_name"], row["caption"]) == ("more/v5.mp4", "more/v5.mp4", "a")
    assert (row["width"], row["height"], row["fps"]) == (WIDTH, HEIGHT, 16.0)
    assert (row["num_frames"], row["duration_sec"]) == (3, FRAMES / 16)
    assert (row["vae_latent_dtype"], row["text_embedding_dtype"]) == ("bfloat16", "bfloat16")
    assert sorted(path.name for path in encoded.iterdir()) == [
        "encode.json",
        "negative.safetensors",
        *(f"shard-0000{n}.parquet" for n in range(3)),
        "skipped.jsonl",
    ]


def test_only_one_model_is_in_memory(pipeline):
    with text_encoder(pipeline, torch.float32, torch.device("cpu")) as embed:
        assert embed(["a red square"]).shape == (1, 512, DIM)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        embed(["a red square"])


class Killed(Exception):
    """Stands in for SIGKILL."""


@pytest.mark.parametrize("last", [1, 4])
def test_a_killed_run_goes_on_with_the_same_bytes(clips, pipeline, encoded, tmp_path, monkeypatch, capsys, last):
    out, count = tmp_path / "data", 0

    def dies(*arguments):
        nonlocal count
        count += 1
        if count > last:
            raise Killed
        return video_clip(*arguments)

    video_clip = video_shards._clip
    with monkeypatch.context() as patch:
        patch.setattr(video_shards, "_clip", dies)
        assert encode(clips, out, pipeline, "--shard-size", "3") == 1
    assert len(list(out.glob("*.parquet"))) == last // 3
    (out / ".shard-00001.parquet.1.tmp").write_text("half")
    capsys.readouterr()

    assert encode(clips, out, pipeline, "--shard-size", "3") == 1
    assert "already holds an encoding; continue it with --resume" in capsys.readouterr().err
    monkeypatch.setattr(video_shards, "write_embeddings", lambda files, *_, **__: files and pytest.fail("again"))
    assert encode(clips, out, pipeline, "--shard-size", "3", "--resume") == 0
    assert digests(out) == digests(encoded)


def test_a_finished_run_is_left_as_it_is(clips, pipeline, encoded, capsys):
    before = digests(encoded)
    assert encode(clips, encoded, pipeline, "--shard-size", "3", "--resume", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["encoded"], result["skipped"], result["shards"]) == (7, [], 3)
    assert (result["latents"], result["text"]) == ([4, 3, HEIGHT // 8, WIDTH // 8], [512, DIM])
    assert digests(encoded) == before


def test_one_shard_tells_the_shape_of_all(clips, pipeline, encoded, capsys, monkeypatch):
    read, check = [], LatentShards._check
    monkeypatch.setattr(
        LatentShards, "_check", lambda self, path, shard: read.append(path.name) or check(self, path, shard)
    )
    assert encode(clips, encoded, pipeline, "--shard-size", "3", "--resume", "--json") == 0
    assert json.loads(capsys.readouterr().out)["latents"] == [4, 3, 6, 8]
    assert read == ["shard-00000.parquet"]


def test_two_processes_write_what_one_does(clips, pipeline, encoded, tmp_path):
    options = ["--out", str(tmp_path / "data"), "--components", str(pipeline), *SIZE, "--shard-size", "3", "--json"]
    first, other = launched(2, "-m", "mla_convert", "encode", clips, *options)
    assert (first.code, other.code) == (0, 0), (first.err, other.err)
    assert json.loads(first.out)["encoded"] == 7 and other.out == ""
    assert digests(tmp_path / "data") == digests(encoded)


def break_videos(folder: Path) -> dict[str, str]:
    """Videos that cannot be used, each with a pattern that its reason matches."""
    write_video(folder / "short.mp4", FRAMES - 1)
    whole = write_video(folder / "whole.mp4").read_bytes()
    (folder / "whole.mp4").unlink()
    (folder / "noise.mp4").write_bytes(b"no video" * 99)
    # The index stands before the frames, of which the last half is missing.
    (folder / "cut.mp4").write_bytes(whole[: len(whole) - (len(whole) - whole.index(b"mdat")) // 2])
    for path in folder.glob("*.mp4"):
        path.with_suffix(".txt").write_text("a")
    (folder / "mute.mp4").write_bytes(whole)
    (folder / "empty.mp4").write_bytes(whole)
    (folder / "empty.txt").write_text(" \n")
    return {
        "cut.mp4": "it cannot be decoded: ",
        "empty.mp4": "its caption is empty",
        "mute.mp4": "its caption file mute.txt does not exist",
        "noise.mp4": "it cannot be decoded: moov atom not found",
        "short.mp4": f"it is too short: {FRAMES - 1} of {FRAMES} frames at 16 per second",
    }


def test_unusable_videos_are_listed_and_left_out(pipeline, tmp_path, capsys):
    videos, out = tmp_path / "videos", tmp_path / "data"
    videos.mkdir()
    reasons = break_videos(videos)
    write_video(videos / "good.mp4").with_suffix(".txt").write_text("a red square")

    # A shard of its own for each, so that some of them stay empty.
    assert encode(videos, out, pipeline, "--shard-size", "1") == 0

    printed = " ".join(capsys.readouterr().out.split())
    listed = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in listed] == list(reasons)
    for row in listed:
        assert row["reason"].startswith(reasons[row["file_name"]])
        assert "0x" not in row["reason"] and str(videos) not in row["reason"]
        assert row["file_name"] in printed
    assert "wrote" in printed and "1 clips" in printed and "skipped 5" in printed
    assert [row["id"] for row in rows(out)] == ["good.mp4"]


def test_nothing_encoded_is_exit_1(pipeline, tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    break_videos(tmp_path / "videos")
    assert encode(tmp_path / "videos", tmp_path / "data", pipeline) == 1
    assert "none of the 5 videos could be encoded" in capsys.readouterr().err
    assert len((tmp_path / "data" / "skipped.jsonl").read_text().splitlines()) == 5


def test_a_stage_trains_on_what_was_encoded(encoded, tmp_path):
    teacher = pico.dense_model(in_channels=4, out_channels=4, text_dim=DIM)
    teacher.save_pretrained(tmp_path / "teacher")
    text = RECIPE.format(teacher=tmp_path / "teacher")
    text = text.split("generate:")[0].replace("rollout_prompts: 2", "rollout_prompts: 0")
    text = text.replace("kind: digits\n  heldout: 4", f"kind: latents\n  folder: {encoded}\n  heldout: 2")
    recipe = parse_recipe(text.replace("steps: 6", "steps: 1"))

    result = run(recipe, tmp_path / "run", until="distill")

    (metrics,) = (tmp_path / "run" / "training").glob("*/metrics.jsonl")
    logged = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert np.isfinite([row["loss"] for row in logged if "loss" in row]).all()
    assert result.model.exists()


def test_prompts_alone_become_embeddings_for_generate(pipeline, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "data"
    prompts.write_text("a red square\n\nthe dark\n over\n")
    options = ["--prompts", str(prompts), "--shard-size", "2", "--json"]
    assert encode(None, out, pipeline, *options, "--dtype", "float32") == 0
    assert json.loads(capsys.readouterr().out)["encoded"] == 3
    files = prompt_files(out)
    assert [path.name for path in files] == ["prompts-00000.safetensors", "prompts-00001.safetensors"]
    embeds = torch.cat([load_prompt_embeds(path, DIM) for path in files])
    stock = stock_pipeline(pipeline, torch.float32)
    with torch.no_grad():
        expected, _ = stock.encode_prompt(
            read_prompts(prompts), do_classifier_free_guidance=False, max_sequence_length=512
        )
    # Observed: 0, from batches of one.
    assert embeds.shape == (3, 512, DIM)
    assert pico.relative_error(embeds, expected) < 1e-5

    before = digests(out)
    files[0].unlink()
    assert encode(None, out, pipeline, *options, "--dtype", "float32", "--resume") == 0
    assert digests(out) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frames", "10"], "--frames 10: the VAE takes one frame and then 4 at a time; give 9 or 13"),
        (["--height", "40"], "--height 40 is not a multiple of 16 (VAE 8 x patch 2); give 32"),
        (["--width", "8"], "--width 8 is not a multiple of 16"),
        (["--prompts", "prompts.txt"], "give exactly one of VIDEOS and --prompts"),
    ],
)
def test_bad_sizes_are_one_line_and_exit_2(clips, pipeline, tmp_path, capsys, options, message):
    assert encode(clips, tmp_path / "data", pipeline, *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frames", "5"], "began with frames 9, not 5; give another --out"),
        (["--dtype", "float32"], "began with dtype bfloat16, not float32"),
    ],
)
def test_resume_takes_the_same_settings(clips, pipeline, encoded, capsys, options, message):
    assert encode(clips, encoded, pipeline, "--shard-size", "3", "--resume", *options) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_resume_takes_the_same_videos(clips, pipeline, encoded, tmp_path, capsys):
    write_video(tmp_path / "v0.mp4").with_suffix(".txt").write_text("a")
    assert encode(tmp_path, encoded, pipeline, "--shard-size", "3", "--resume") == 2
    assert "the videos or captions differ from those" in capsys.readouterr().err


def test_what_is_no_pipeline_or_not_ours_is_refused(clips, pipeline, tmp_path, capsys):
    assert encode(clips, tmp_path / "data", tmp_path) == 1
    assert "has no text_encoder/config.json" in capsys.readouterr().err
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("x")
    assert encode(clips, tmp_path / "data", pipeline) == 1
    assert "is not a folder of encoded data" in capsys.readouterr().err


def test_frames_are_resampled_resized_and_cut(tmp_path):
    path = write_video(tmp_path / "a.mp4", frames=24, fps=24)
    same = read_frames(path, 24, 64, 96, 24)
    assert same.dtype == torch.uint8 and same.shape == (24, 64, 96, 3)
    # Observed: 0.66 levels, all of it where the color changes and its resolution is half.
    error = np.abs(same.numpy() - 255 * square(24))
    assert error[:, 50:].max() < 1 and error.mean() < 2

    slower = read_frames(path, 9, 64, 96, 12)
    assert torch.equal(slower, same[0:18:2])
    with pytest.raises(UnusableVideo, match="12 of 13 frames at 12 per second"):
        read_frames(path, 13, 64, 96, 12)

    cut = read_frames(path, 5, 64, 64, 24)
    assert torch.equal(cut, same[:5, :, 16:80])
    assert read_frames(path, 5, 128, 64, 24).shape == (5, 128, 64, 3)
    pixels = to_pixels(cut)
    assert pixels.shape == (3, 5, 64, 64) and pixels.dtype == torch.float32
    assert pixels.min() >= -1 and pixels.max() <= 1


def test_ahead_keeps_the_order():
    assert list(ahead(lambda x: x * x, range(9), 3)) == [x * x for x in range(9)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", 'file_name,text\nb.mp4,"the dark, over"\na.mp4,a red square\nc.mp4,gone\n'),
        (
            "metadata.jsonl",
            '{"file_name": "b.mp4", "text": "the dark, over"}\n\n{"file_name": "a.mp4", "text": "a red square"}\n'
            '{"file_name": "c.mp4", "text": "gone"}\n',
        ),
        ("captions.json", '{"b.mp4": "the dark, over", "a.mp4": "a red square", "c.mp4": "gone"}'),
        (
            "captions.json",
            '[{"path": "b.mp4", "cap": ["the dark, over"]}, {"path": "a.mp4", "caption": "a red square"},'
            '{"path": "c.mp4", "caption": "gone"}]',
        ),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_tables_name_videos_and_captions(tmp_path, name, text, whole):
    for video in "ab":
        (tmp_path / f"{video}.mp4").write_bytes(b"video")
    (tmp_path / name).write_text(text)
    entries = find_videos(tmp_path if whole else tmp_path / name)
    captions = [("a.mp4", "a red square"), ("b.mp4", "the dark, over"), ("c.mp4", "gone")]
    assert [entry[:2] for entry in entries] == captions
    assert [entry.problem for entry in entries] == ["", "", "there is no such file"]


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        ({}, "", "holds no videos"),
        ({}, "nowhere", "does not exist; give a folder of videos or a table"),
        ({"a.mp4": ""}, "", "none of the 1 videos .* can be used; a.mp4: its caption file a.txt"),
        ({"metadata.csv": "name,text\na.mp4,x\n"}, "", "row 1: none of the columns file_name, path, video"),
        ({"metadata.jsonl": '{"file_name": 3, "text": "x"}'}, "", "row 1: file_name is not text"),
        ({"metadata.jsonl": "{"}, "", "metadata.jsonl cannot be read"),
        ({"captions.json": "3"}, "", "is not a table of videos"),
        ({"metadata.csv": "", "captions.json": ""}, "", "holds metadata.csv and captions.json; give the path of one"),
        ({"a.tsv": ""}, "a.tsv", "is not a table of videos; give a .csv, .jsonl or .json"),
    ],
)
def test_sources_that_cannot_be_used_are_one_line(tmp_path, files, source, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        find_videos(tmp_path / source)
    assert "\n" not in str(error.value)


def test_the_documentation_names_every_table() -> None:
    text = (Path(__file__).parents[1] / "docs" / "encode.md").read_text(encoding="utf-8")
    assert [name for name in TABLES if f"`{name}`" not in text] == []
