"""Each shard of a large folder is opened, or waited for, only once."""

from __future__ import annotations

from collections import Counter

import pytest
from shard_case import count_openings
from test_skipped_clips import clips

from mla_convert.distill import shard_files, waiting
from mla_convert.distill.clip_shards import write_latents, write_shard
from mla_convert.distill.data import DataConfig, open_data
from mla_convert.distill.latents import LatentShards
from mla_convert.distill.shard_files import OPEN_FILES, clips_in

SHARDS = OPEN_FILES + 2


@pytest.fixture
def opened(monkeypatch):
    return count_openings(monkeypatch)


def test_a_folder_is_opened_shard_by_shard_once(tmp_path, opened):
    write_latents(tmp_path, clips(SHARDS), clips_per_shard=1)
    assert open_data(DataConfig(kind="latents", folder=str(tmp_path), heldout=3), seed=0).size == SHARDS - 3
    assert len(opened) == SHARDS and set(opened.values()) == {1}


def test_a_shard_alone_is_read_as_a_folder_is(tmp_path, opened):
    (first, second) = write_latents(tmp_path, clips(4), clips_per_shard=2)
    expected = LatentShards(tmp_path).read(2)["latents"]
    opened.clear()
    shard_files._open.cache_clear()
    assert LatentShards(second).read(0)["latents"].equal(expected)
    # For the index, and for the clip.
    assert opened == {second.name: 2} and len(LatentShards(second)) == clips_in(first) == 2
    write_shard(tmp_path / "empty.parquet", [])
    assert clips_in(tmp_path / "empty.parquet") == 0


def test_a_file_that_is_there_is_not_looked_at_again(tmp_path, monkeypatch):
    looked, told = Counter(), []

    class Appearing(type(tmp_path)):
        """The first exists; the others exist from the third look on."""

        def exists(self):
            looked[self.name] += 1
            return self.name == "first" or looked[self.name] == 3

    monkeypatch.setattr(waiting, "_POLL_SECONDS", 0)
    paths = [Appearing(tmp_path / name) for name in ("first", "second", "third")]
    waiting.wait_for_files(paths, waiting.Notices.of_run(), told.append)
    assert looked == {"first": 1, "second": 3, "third": 3} and told == [2, 2]
