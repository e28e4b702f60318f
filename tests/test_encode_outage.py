"""What `encode` makes of videos that are away for a while, hang or are taken away, and how it deals out its work."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import imageio_ffmpeg
import pytest
from recipe_case import digests
from test_encode import FRAMES, clips, encode, encoded, pipeline, write_video

from mla_convert.distill.encode import frames, shares
from mla_convert.distill.encode import videos as video_shards
from mla_convert.distill.encode.frames import UnusableVideo, read_frames
from mla_convert.distill.encode.sources import Entry
from mla_convert.distill.encode.videos import Shard
from mla_convert.distill.waiting import Notices
from mla_convert.errors import UserError

__all__ = ["clips", "encoded", "pipeline"]
IN_SHARDS = ("--shard-size", "3")


@pytest.fixture
def table(clips, tmp_path) -> Path:
    """A copy of the videos with a table of them, so that a file may be missing."""
    folder = tmp_path / "videos"
    shutil.copytree(clips, folder)
    rows = {}
    for path in sorted(folder.rglob("*.txt")):
        rows[path.relative_to(folder).with_suffix(".mp4").as_posix()] = path.read_text()
        path.unlink()
    (folder / "captions.json").write_text(json.dumps(rows))
    return folder


def skipped(out: Path) -> list[tuple[str, str]]:
    return [tuple(json.loads(line).values()) for line in (out / "skipped.jsonl").read_text().splitlines()]


@pytest.fixture
def away(monkeypatch):
    """Names of files whose disk is away."""
    names, own = set(), Path.open

    def opening(path, *given, **settings):
        if path.name in names:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return own(path, *given, **settings)

    monkeypatch.setattr(Path, "open", opening)
    return names


def same(out: Path, encoded: Path) -> bool:
    """Whether a table's videos were encoded as those of the folder were, whose names have another digest."""
    return digests(out) == digests(encoded) | {"encode.json": digests(out)["encode.json"]}


def test_a_disk_that_fails_ends_the_encoding_and_its_shard(table, pipeline, encoded, tmp_path, capsys, away):
    out = tmp_path / "data"
    away.add("v2.mp4")
    assert encode(table, out, pipeline, *IN_SHARDS) == 1
    assert "v2.mp4: Input/output error; bring its disk back or put an empty file" in capsys.readouterr().err
    assert [path.name for path in out.glob("*.parquet")] == ["shard-00000.parquet"]
    away.clear()
    assert encode(table, out, pipeline, *IN_SHARDS, "--resume") == 0
    assert same(out, encoded)


@pytest.mark.parametrize("ends", ["count", "disk", "interrupt"])
def test_shards_since_an_outage_began_are_written_again(
    table, pipeline, encoded, tmp_path, monkeypatch, capsys, away, ends
):
    """It began in the first shard of three and lasted through the second."""
    out, good = tmp_path / "data", {}
    monkeypatch.setattr(video_shards, "IN_A_ROW", 5 if ends == "count" else 50)
    for name in ("v0.mp4", "v1.mp4", "v2.mp4", "v3.mp4", "v4.mp4")[: 5 if ends == "count" else 4]:
        good[name] = (table / name).read_bytes()
        (table / name).write_bytes(b"no video" * 99)
    own = video_shards.read_frames
    with monkeypatch.context() as patch:
        if ends == "disk":
            away.add("v4.mp4")
        if ends == "interrupt":
            patch.setattr(video_shards, "read_frames", lambda path, *size: read_or_end(own, path, *size))
        assert encode(table, out, pipeline, *IN_SHARDS) != 0
    assert list(out.glob("*.parquet")) == []
    away.clear()
    for name, content in good.items():
        (table / name).write_bytes(content)
    assert encode(table, out, pipeline, *IN_SHARDS, "--resume") == 0
    assert same(out, encoded) and skipped(out) == []


def read_or_end(read, path, *size):
    if path.name == "v4.mp4":
        raise KeyboardInterrupt
    return read(path, *size)


def test_a_good_video_ends_an_outage(table, pipeline, tmp_path, away):
    """Shards from before it stay."""
    (table / "v0.mp4").write_bytes(b"no video" * 99)
    away.add("v4.mp4")
    assert encode(table, tmp_path / "data", pipeline, *IN_SHARDS) == 1
    assert len(list((tmp_path / "data").glob("*.parquet"))) == 2


def test_a_disk_that_fails_under_ffmpeg_is_no_broken_video(tmp_path, away, monkeypatch):
    video = tmp_path / "v.mp4"
    video.write_bytes(b"no video" * 99)
    own = frames.subprocess.run
    monkeypatch.setattr(frames.subprocess, "run", lambda *given, **set: (away.add("v.mp4"), own(*given, **set))[1])
    with pytest.raises(UserError, match=r"cannot open .*v\.mp4: Input/output error"):
        read_frames(video, FRAMES, 48, 64, 16)


def test_a_bad_row_is_skipped(table, pipeline, tmp_path, monkeypatch):
    """It is not taken for an outage, and looked at again if it is only that the file may not be opened."""
    rows = json.loads((table / "captions.json").read_text())
    bad = {
        "": "it cannot be opened: it is a folder",
        "a\0b.mp4": "it cannot be opened: it is no file name",
        "loop.mp4": "it cannot be opened: Too many levels of symbolic links",
        "v2.mp4": "it cannot be opened: Permission denied",
        "v3.mp4": "the file is empty",
        "x" * 300 + ".mp4": "it cannot be opened: File name too long",
    }
    (table / "captions.json").write_text(json.dumps(dict.fromkeys(bad, "lost") | rows))
    (table / "loop.mp4").symlink_to("loop.mp4")
    content = (table / "v3.mp4").read_bytes()
    (table / "v3.mp4").write_bytes(b"")
    own, closed = Path.open, {"v2.mp4"}

    def opening(path, *given, **settings):
        if path.name in closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return own(path, *given, **settings)

    monkeypatch.setattr(Path, "open", opening)
    out = tmp_path / "data"
    assert encode(table, out, pipeline, *IN_SHARDS) == 0
    assert dict(skipped(out)) == bad
    closed.clear()
    (table / "v3.mp4").write_bytes(content)
    assert encode(table, out, pipeline, *IN_SHARDS, "--resume") == 0
    assert dict(skipped(out)) == {name: bad[name] for name in bad if name not in ("v2.mp4", "v3.mp4")}


def test_an_empty_file_takes_the_place_of_a_video_in_a_folder(clips, pipeline, tmp_path, capsys, away):
    """Taken away, it would be missing in the digest of names. Empty ones count as no outage."""
    shutil.copytree(clips, tmp_path / "videos")
    out, video = tmp_path / "data", tmp_path / "videos" / "v2.mp4"
    away.add("v2.mp4")
    assert encode(tmp_path / "videos", out, pipeline, *IN_SHARDS) == 1
    capsys.readouterr()
    away.clear()
    video.write_bytes(b"")
    assert encode(tmp_path / "videos", out, pipeline, *IN_SHARDS, "--resume") == 0
    assert skipped(out) == [("v2.mp4", "the file is empty")]


def test_a_video_that_was_away_is_encoded_when_it_is_back(table, pipeline, encoded, tmp_path):
    out, away = tmp_path / "data", tmp_path / "away"
    (table / "v2.mp4").rename(away)
    assert encode(table, out, pipeline, *IN_SHARDS) == 0
    assert skipped(out) == [("v2.mp4", "there is no such file")]
    kept = (out / "shard-00000.parquet").stat().st_mtime_ns
    away.rename(table / "v2.mp4")
    assert encode(table, out, pipeline, *IN_SHARDS, "--resume") == 0
    assert skipped(out) == [] and (out / "shard-00000.parquet").stat().st_mtime_ns == kept
    assert same(out, encoded)


def test_a_video_may_be_taken_away_before_resuming(table, pipeline, encoded, tmp_path, monkeypatch, capsys):
    """One that ends the process or hangs would do so again."""
    out, own = tmp_path / "data", video_shards.read_frames

    def dying(path, *size):
        if path.name == "v5.mp4":
            raise MemoryError
        return own(path, *size)

    monkeypatch.setattr(video_shards, "read_frames", dying)
    assert encode(table, out, pipeline, "--shard-size", "1") == 1
    (table / "more" / "v5.mp4").unlink()
    assert encode(table, out, pipeline, "--shard-size", "1", "--resume") == 0
    assert skipped(out) == [("more/v5.mp4", "there is no such file")]
    assert len(list(out.glob("*.parquet"))) == 7


def test_broken_videos_in_a_row_end_the_encoding(table, pipeline, encoded, tmp_path, monkeypatch, capsys):
    out, good = tmp_path / "data", {}
    monkeypatch.setattr(video_shards, "IN_A_ROW", 3)
    for name in ("v1.mp4", "v2.mp4", "v3.mp4"):
        good[name] = (table / name).read_bytes()
        (table / name).write_bytes(b"no video" * 99)
    assert encode(table, out, pipeline, *IN_SHARDS) == 1
    error = capsys.readouterr().err
    assert "3 videos in a row cannot be used, the last is v3.mp4: it cannot be decoded" in error
    assert [path.name for path in out.glob("*.parquet")] == ["shard-00000.parquet"]
    for name, content in good.items():
        (table / name).write_bytes(content)
    assert encode(table, out, pipeline, *IN_SHARDS, "--resume") == 0
    assert same(out, encoded)


def test_short_videos_in_a_row_do_not(table, pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(video_shards, "IN_A_ROW", 2)
    for name in ("v1.mp4", "v2.mp4", "v3.mp4"):
        write_video(table / name, FRAMES - 1)
    assert encode(table, tmp_path / "data", pipeline, *IN_SHARDS) == 0
    assert len(skipped(tmp_path / "data")) == 3


def test_a_video_that_hangs_is_unusable(clips, tmp_path, monkeypatch):
    hanging = tmp_path / "ffmpeg"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(hanging))
    monkeypatch.setattr(frames, "DECODE_SECONDS", 0.2)
    with pytest.raises(UnusableVideo, match=r"it takes longer than 0\.2 seconds to decode"):
        read_frames(clips / "v0.mp4", FRAMES, 48, 64, 16)
    with pytest.raises(UnusableVideo, match="there is no such file"):
        read_frames(clips / "v99.mp4", FRAMES, 48, 64, 16)


def test_captions_wait_on_disk_for_one_block_of_videos(clips, pipeline, encoded, tmp_path, monkeypatch):
    waiting, own = [], video_shards.video_vae

    def loaded(*given):
        waiting.append(sorted(path.name for path in (tmp_path / "data" / ".encode").iterdir()))
        return own(*given)

    monkeypatch.setattr(video_shards, "video_vae", loaded)
    monkeypatch.setattr(video_shards, "BLOCK", 3)
    assert encode(clips, tmp_path / "data", pipeline, *IN_SHARDS) == 0
    assert waiting == [[f"shard-0000{number}.safetensors"] for number in range(3)]
    assert digests(tmp_path / "data") == digests(encoded)


def test_a_share_comes_back_as_it_was_dealt(tmp_path):
    entries = [Entry("a.mp4", "é\n", Path("/v/a.mp4")), Entry("b.mp4", "", Path("/v/b.mp4"), "its caption is empty")]
    dealt = [Shard(tmp_path / "shard-00002.parquet", entries, 128), Shard(tmp_path / "shard-00005.parquet", [], 320)]
    path = shares.share_file(tmp_path, 7, 1)
    shares.write_share(path, dealt)
    assert shares.read_share(path, Notices("a launch")) == dealt
