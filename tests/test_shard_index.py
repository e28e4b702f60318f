"""The index of a folder of shards is read once, and a shard that is damaged later keeps its place in it."""

from __future__ import annotations

import errno
import json
import logging
from pathlib import Path

import pico
import pytest
import torch
from recipe_case import digests
from shard_case import count_openings
from test_skipped_clips import TEXT, clips, number_of, recipe

from mla_convert.distill import latents, shard_files
from mla_convert.distill.clip_shards import Clip, write_latents, write_shard
from mla_convert.distill.data import DataConfig, open_data
from mla_convert.distill.latents import LatentShards
from mla_convert.distill.normalization import KIND_NOTE
from mla_convert.distill.shard_index import index_shards, read_index, write_index
from mla_convert.errors import UserError
from mla_convert.pipeline import run
from mla_convert.pipeline.context import CLIPS, Context


@pytest.fixture
def opened(monkeypatch):
    return count_openings(monkeypatch)


def opened_data(folder, known=None, checked=False, **settings):
    config = DataConfig(kind="latents", folder=str(folder), heldout=3, **{"split": "last", **settings})
    return open_data(config, 0, (), known, checked)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_a_known_index_opens_no_shard_and_only_what_has_changed_is_read(tmp_path, opened):
    paths = write_latents(tmp_path / "data", clips(), clips_per_shard=4)
    first = index_shards(tmp_path / "data")
    assert opened == {path.name: 1 for path in paths}
    write_index(tmp_path / "index.json", first)
    known = read_index(tmp_path / "index.json", tmp_path / "data")
    assert known == first
    assert read_index(tmp_path / "index.json", tmp_path) is None
    (tmp_path / "broken.json").write_text("{")
    assert read_index(tmp_path / "broken.json", tmp_path / "data") is None

    opened.clear()
    data = opened_data(tmp_path / "data", known)
    assert data.size == 7 and not opened and data.identity == opened_data(tmp_path / "data").identity
    opened.clear()
    write_shard(paths[1], clips(3))
    assert [shard.clips for shard in index_shards(tmp_path / "data", known).shards] == [4, 3, 2]
    assert opened == {paths[1].name: 1}


def test_another_process_neither_lists_nor_checks(tmp_path, opened, caplog, monkeypatch):
    """Nor does it sample latents, and it warns of nothing."""
    write_latents(tmp_path, clips(shape=(16, 3, 8, 8)), clips_per_shard=4)
    sampled = []
    monkeypatch.setattr(latents, "evidence_of_raw", lambda clips, scale: sampled.append(len(list(clips))) or 0.0)
    with caplog.at_level(logging.WARNING):
        index = opened_data(tmp_path).shards.index
        assert caplog.text.count("cannot tell whether the latents") == 1 and sampled == [10]
        opened.clear()
        write_latents(tmp_path, clips(1), first_shard=7)
        data = opened_data(tmp_path, index, checked=True)
    assert data.size == 7 and not opened and caplog.text.count("cannot tell") == 1 and sampled == [10]
    assert data.example(0)["latents"].shape == (16, 3, 8, 8)


def test_other_shapes_are_found_in_the_footers_or_when_a_clip_is_read(tmp_path):
    made = clips(5)
    made[3] = Clip(torch.zeros(1, 5, 8, 8), made[3].encoder_hidden_states)
    write_latents(tmp_path / "sizes", made)
    with pytest.raises(UserError, match=r"clip 3 of .*shard-00000\.parquet has latents of 1x5x8x8, the first clip has"):
        LatentShards(tmp_path / "sizes")
    # As many bytes, so that a footer does not tell.
    made[3] = Clip(torch.zeros(1, 8, 8, 6), made[3].encoder_hidden_states)
    (tmp_path / "bytes").mkdir()
    write_shard(tmp_path / "bytes" / "a.parquet", made)
    with pytest.raises(UserError, match=r"clip 3 of .*a\.parquet has latents of 1x8x8x6, the first clip has 1x6x8x8"):
        LatentShards(tmp_path / "bytes")
    # It says that this package has written it, so that one shape is taken for all.
    write_shard(tmp_path / "bytes" / "a.parquet", made, notes={KIND_NOTE: "normalized"})
    shards = LatentShards(tmp_path / "bytes")
    assert [len(shard.shapes) for shard in shards.index.shards] == [1]
    with pytest.raises(UserError, match=r"clip 3 of .* has latents of 1x8x8x6, .*continue without it: data\.skip: \[3"):
        shards.read(3)
    assert opened_data(tmp_path / "bytes", skip=(3,)).size == 2


@pytest.mark.parametrize(("notes", "count"), [({KIND_NOTE: "normalized"}, 1), (None, 8)])
def test_one_read_a_clip_tells_its_shape(tmp_path, monkeypatch, notes, count):
    """And none where this package has written the shard."""
    write_shard(tmp_path / "a.parquet", clips(8), notes=notes)
    read, own = [], shard_files.pq.ParquetFile.read_row_group

    def reading(self, number, columns, **settings):
        read.append(columns)
        return own(self, number, columns=columns, **settings)

    monkeypatch.setattr(shard_files.pq.ParquetFile, "read_row_group", reading)
    index_shards(tmp_path)
    assert len(read[0]) == 2 and read[1:] == [["vae_latent_shape"]] * (count - 1)


def test_a_shard_that_is_truncated_while_it_is_open_is_one_line(tmp_path):
    """Mapped into memory, it would end the process with SIGBUS."""
    generator = torch.Generator().manual_seed(0)
    big = [Clip(torch.randn(4, 8, 64, 64, generator=generator), torch.randn(TEXT, generator=generator))] * 2
    (path,) = write_latents(tmp_path, big)
    shards = LatentShards(tmp_path)
    shards.read(0)
    with path.open("r+b") as file:
        file.truncate(100_000)
    with pytest.raises(UserError, match=r"cannot read clip 1 of .*shard-00000\.parquet: .*data\.skip: \[1\]") as error:
        shards.read(1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_an_error_that_passes_is_tried_again(tmp_path, monkeypatch, code):
    made = clips(4)
    write_latents(tmp_path, made)
    shards, failures, own = LatentShards(tmp_path), [], shard_files.pq.ParquetFile.read_row_group

    def failing(self, *given, **settings):
        if len(failures) < allowed:
            failures.append(code)
            raise OSError(code, "it fails")
        return own(self, *given, **settings)

    monkeypatch.setattr(shard_files.pq.ParquetFile, "read_row_group", failing)
    monkeypatch.setattr(shard_files, "_RETRY_AFTER", (0.0, 0.0))
    allowed = 2
    assert torch.equal(shards.read(1)["latents"], made[1].latents)
    assert len(failures) == 2
    allowed = 5
    with pytest.raises(UserError, match=r"cannot read clip 1 of .*it fails; .*data\.skip: \[1\]"):
        shards.read(1)
    assert len(failures) == 5


def test_a_shard_that_was_never_read_may_be_left_out(tmp_path):
    made = clips()
    paths = write_latents(tmp_path / "data", made, clips_per_shard=4)
    whole = opened_data(tmp_path / "data")
    cut(paths[0])
    remedy = r"cannot read .*shard-00000\.parquet: .*leave it out: data\.skip: \[shard-00000\.parquet\]"
    with pytest.raises(UserError, match=remedy):
        opened_data(tmp_path / "data")
    data = opened_data(tmp_path / "data", skip=("shard-00000.parquet",))
    assert data.size == 3 and data.identity != whole.identity and data.identity["clips"] == 6
    assert [number_of(data.example(i), made) for i in range(3)] == [4, 5, 6]


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_a_shard_of_a_known_index_keeps_its_clips(tmp_path, damage, caplog):
    made = clips()
    paths = write_latents(tmp_path / "data", made, clips_per_shard=4)
    whole = opened_data(tmp_path / "data")
    damage(paths[1])
    shard_files._open.cache_clear()
    if damage is cut:
        with caplog.at_level(logging.WARNING):
            data = opened_data(tmp_path / "data", whole.shards.index)
        assert "cannot read 1 of the shards" in caplog.text and "data.skip: [shard-00001.parquet]" in caplog.text
        assert data.identity == whole.identity
        with pytest.raises(UserError, match=r"cannot read clip 1 of .*shard-00001\.parquet: .*data\.skip: \[5\]"):
            data.example(5)
        caplog.clear()
    less = opened_data(tmp_path / "data", whole.shards.index, skip=("shard-00001.parquet",))
    assert less.identity == whole.identity and caplog.text == ""
    # The next clip that is kept stands in; the held-out one of the shard is dropped.
    assert [number_of(less.example(i), made) for i in range(7)] == [0, 1, 2, 3, 0, 0, 0]
    assert [number_of({"latents": latents}, made) for latents in less.heldout()["latents"]] == [8, 9]


def test_a_shard_that_was_never_read_stays_left_out_when_it_is_written_again(tmp_path):
    """A run that began without it goes on without it."""
    made, skip = clips(), ("shard-00001.parquet",)
    paths = write_latents(tmp_path / "data", made, clips_per_shard=4)
    whole = paths[1].read_bytes()
    cut(paths[1])
    begun = opened_data(tmp_path / "data", skip=skip)
    paths[1].write_bytes(whole)
    again = opened_data(tmp_path / "data", begun.shards.index, skip=(*skip, "v9.mp4", "v3.mp4"))
    assert again.identity == begun.identity and again.size == 3
    # Clip 9 is number 5 of those that are counted.
    assert again.shards.index.named["v9.mp4"] == [5]
    assert opened_data(tmp_path / "data", begun.shards.index).identity != begun.identity


def test_only_clips_of_a_recipe_are_skipped_by_it(tmp_path):
    paths = write_latents(tmp_path, clips(), clips_per_shard=4)
    shards = LatentShards(tmp_path, skippable=False)
    cut(paths[0])
    shard_files._open.cache_clear()
    for reading in (lambda: shards.read(0), lambda: LatentShards(tmp_path, skippable=False)):
        with pytest.raises(UserError, match=r"cannot read .*shard-00000") as error:
            reading()
        assert "data.skip" not in str(error.value)


def test_a_search_without_a_shard_is_not_remembered(tmp_path, monkeypatch):
    write_latents(tmp_path, clips(), clips_per_shard=4)
    shards, own = LatentShards(tmp_path), latents.read_once

    def failing(path, read):
        if path.name == "shard-00001.parquet":
            raise OSError(errno.ETIMEDOUT, "timed out")
        return own(path, read)

    with monkeypatch.context() as patch:
        patch.setattr(latents, "read_once", failing)
        assert shards.numbers({"v5.mp4", "v8.mp4"}) == {"v5.mp4": [], "v8.mp4": [8]}
    assert shards.index.named == {}
    assert shards.numbers({"v5.mp4", "v8.mp4"}) == {"v5.mp4": [5], "v8.mp4": [8]} == shards.index.named


def test_the_time_of_a_shard_is_asked_for_again_and_any_file_is_overwritten(tmp_path, monkeypatch):
    write_latents(tmp_path / "data", clips(), clips_per_shard=4)
    own, failed = Path.stat, []

    def stale(self, **settings):
        if self.name == "shard-00001.parquet" and not failed:
            failed.append(self)
            raise OSError(errno.ESTALE, "Stale file handle")
        return own(self, **settings)

    monkeypatch.setattr(shard_files, "_RETRY_AFTER", (0.0, 0.0))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", stale)
        index = index_shards(tmp_path / "data")
    assert len(failed) == 1
    (tmp_path / "index.json").write_bytes(b"\xff\xfe\x00")
    assert read_index(tmp_path / "index.json", tmp_path / "data") is None
    write_index(tmp_path / "index.json", index)
    assert read_index(tmp_path / "index.json", tmp_path / "data") == index


def test_names_are_searched_for_once(tmp_path, opened):
    write_latents(tmp_path, clips(), clips_per_shard=4)
    skip = ("v3.mp4", "v8.mp4", "shard-00001.parquet")
    index = opened_data(tmp_path, skip=skip).shards.index
    assert index.named == {"v3.mp4": [3], "v8.mp4": [8], "shard-00001.parquet": [4, 5, 6, 7]}
    opened.clear()
    assert opened_data(tmp_path, index, skip=skip).size == 7 and not opened


def test_a_run_goes_on_behind_a_shard_that_became_unreadable(tmp_path):
    teacher = tmp_path / "teacher"
    pico.dense_model(in_channels=1, out_channels=1, text_dim=TEXT[1]).save_pretrained(teacher)
    for name in ("data", "same"):
        write_latents(tmp_path / name, clips(), clips_per_shard=4)
    extra = ("distill.0.checkpoint_every=1", "convert.init=activation")
    run(recipe(teacher, tmp_path / "data", *extra), tmp_path / "run", until="convert")
    assert [shard[3] for shard in json.loads((tmp_path / "run" / CLIPS).read_text())["shards"]] == [4, 4, 2]
    cut(tmp_path / "data" / "shard-00000.parquet")
    shard_files._open.cache_clear()
    with pytest.raises(UserError, match=r"cannot read clip \d of .*shard-00000\.parquet"):
        run(recipe(teacher, tmp_path / "data", *extra), tmp_path / "run", resume=True, until="distill")
    skip = (*extra, "data.skip=[shard-00000.parquet]")
    resumed = run(recipe(teacher, tmp_path / "data", *skip), tmp_path / "run", resume=True, until="distill")
    # The conversion had read all clips.
    run(recipe(teacher, tmp_path / "same", *extra), tmp_path / "unbroken", until="convert")
    unbroken = run(recipe(teacher, tmp_path / "same", *skip), tmp_path / "unbroken", resume=True, until="distill")
    assert digests(resumed.model / "transformer") == digests(unbroken.model / "transformer")


def test_the_first_process_passes_its_index_on(tmp_path, monkeypatch, opened):
    teacher = tmp_path / "teacher"
    pico.dense_model(in_channels=1, out_channels=1, text_dim=TEXT[1]).save_pretrained(teacher)
    write_latents(tmp_path / "data", clips(), clips_per_shard=4)
    passed = []
    monkeypatch.setattr("mla_convert.pipeline.context.from_main", lambda index: passed.append(index) or passed[0])
    own = recipe(teacher, tmp_path / "data")
    first, other = (Context(own, tmp_path / "run", lambda *told: None, main=main) for main in (True, False))
    first.share_clips()
    opened.clear()
    other.share_clips()
    assert other.data.identity == first.data.identity and passed[1] is None and not opened
    assert read_index(tmp_path / "run" / CLIPS, tmp_path / "data") == passed[0]
