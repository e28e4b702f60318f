"""Whether shards hold normalized or raw latents is known from their metadata, the recipe or the statistics."""

from __future__ import annotations

import inspect
import logging

import pico
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKLWan
from pydantic import ValidationError

from mla_convert.distill import shard_files
from mla_convert.distill.clip_shards import Clip, write_shard
from mla_convert.distill.data import DataConfig, open_data
from mla_convert.distill.latents import LatentShards
from mla_convert.distill.normalization import EVIDENCE, WAN21, WAN22, Scale, evidence_of_raw, notes_of
from mla_convert.distill.shard_files import read_notes
from mla_convert.errors import UserError

SHAPE, TEXT = (3, 8, 8), torch.ones(2, 4)
SCALES = {16: WAN21, 48: WAN22}


def normalized(count, channels=16, seed=0, contrast=0.0, level=0.0):
    """Clips with their own mean and contrast in every channel."""
    generator = torch.Generator().manual_seed(seed)
    factors = (contrast * torch.randn(channels, 1, 1, 1, generator=generator)).exp()
    shifts = level * torch.randn(channels, 1, 1, 1, generator=generator)
    return [factors * torch.randn(channels, *SHAPE, generator=generator) + shifts for _ in range(count)]


def raw(clips):
    """The same clips as the VAE returns them."""
    scale = SCALES[len(clips[0])]
    mean, std = (torch.tensor(part).view(-1, 1, 1, 1) for part in scale)
    return [clip * std + mean for clip in clips]


def write(folder, clips, notes=None, name="shard-00000.parquet"):
    write_shard(folder / name, [Clip(clip, TEXT) for clip in clips], notes=notes)
    return folder


def opened(folder, **settings):
    return open_data(DataConfig(kind="latents", folder=str(folder), heldout=1, split="last", **settings), seed=0)


def test_statistics_are_those_of_the_vae():
    defaults = inspect.signature(AutoencoderKLWan.__init__).parameters
    assert tuple(defaults["latents_mean"].default) == WAN21.mean
    assert tuple(defaults["latents_std"].default) == WAN21.std
    assert [len(part) for part in WAN22] == [48, 48]


@pytest.mark.parametrize("channels", [16, 48])
def test_raw_latents_are_refused_and_normalized_where_the_recipe_says_so(tmp_path, channels):
    clips = normalized(4, channels)
    write(tmp_path, raw(clips))
    with pytest.raises(UserError, match=r"look raw, not normalized, .*; set data\.latents: raw"):
        opened(tmp_path)
    shards = LatentShards(tmp_path, latents="raw")
    for index, clip in enumerate(clips):
        # Observed: 1.2e-7.
        assert pico.relative_error(shards.read(index)["latents"], clip) < 1e-6
    assert torch.equal(LatentShards(tmp_path, latents="normalized").read(0)["latents"], raw(clips)[0])


@pytest.mark.parametrize("channels", [16, 48])
@pytest.mark.parametrize("seed", range(20))
def test_small_sets_with_statistics_of_their_own_are_told_apart(channels, seed):
    # Every channel 20 % more or less contrast, its mean a third of a standard deviation away, and all of it scaled.
    for scale in (0.5, 1.0, 2.0):
        clips = [scale * clip for clip in normalized(2, channels, seed, contrast=0.2, level=0.3)]
        # Observed over 200 seeds: -0.3 at most, and 4.0 at least, of 16 channels; -20 and 24 of 48.
        assert evidence_of_raw(clips, SCALES[channels]) < EVIDENCE
    clips = normalized(2, channels, seed, contrast=0.2, level=0.3)
    assert evidence_of_raw(raw(clips), SCALES[channels]) > EVIDENCE


def test_what_cannot_be_told_is_said_and_taken_as_normalized(tmp_path, caplog):
    # Between the two.
    mean, std = (torch.tensor(part).view(-1, 1, 1, 1) for part in WAN21)
    write(tmp_path, [clip * std**0.4 + 0.4 * mean for clip in normalized(2)])
    with caplog.at_level(logging.WARNING):
        data = opened(tmp_path)
    assert "are normalized, and uses them unchanged" in caplog.text and "data.latents" in caplog.text
    assert torch.equal(data.heldout()["latents"][0], data.shards.read(1)["latents"])


def test_constant_clips_say_nothing():
    assert evidence_of_raw([torch.zeros(16, *SHAPE)], WAN21) == 0


def test_a_shard_says_what_it_holds(tmp_path):
    scale = Scale((1.0, -2.0), (3.0, 0.5))
    clips = normalized(2, channels=2)
    write(tmp_path, [3 * clips[0], clips[1]], notes_of(scale))
    write(tmp_path, clips, notes_of(None), "shard-00001.parquet")
    shards = LatentShards(tmp_path)
    assert torch.equal(shards.read(0)["latents"], scale.standardize(3 * clips[0]))
    assert torch.equal(shards.read(2)["latents"], clips[0])
    with pytest.raises(UserError, match=r"latents is raw, but the metadata of .*shard-00001.* says normalized"):
        opened(tmp_path, latents="raw")
    assert read_notes(tmp_path / "shard-00001.parquet")["mla_convert.latents"] == "normalized"


def test_notes_are_believed_and_not_looked_behind(tmp_path):
    write(tmp_path, raw(normalized(2)), notes_of(None))
    assert opened(tmp_path).size == 1


def test_raw_latents_of_an_unknown_vae_are_refused(tmp_path):
    write(tmp_path, normalized(2, channels=4))
    assert opened(tmp_path).size == 1
    with pytest.raises(UserError, match=r"have 4 channels and no statistics in the metadata"):
        opened(tmp_path, latents="raw")


def test_latents_is_for_folders():
    with pytest.raises(ValidationError, match="kind digits reads none; leave it out"):
        DataConfig(latents="raw")


def test_a_row_group_of_many_clips_is_decoded_once_for_clips_in_turn(tmp_path, monkeypatch, caplog):
    clips = normalized(6, channels=3)
    path = write(tmp_path / "ours", clips) / "shard-00000.parquet"
    (tmp_path / "theirs").mkdir()
    pq.write_table(pq.read_table(path), tmp_path / "theirs" / "data.parquet", row_group_size=4)
    with caplog.at_level(logging.WARNING):
        shards, again = LatentShards(tmp_path / "theirs"), LatentShards(tmp_path / "theirs")
    assert caplog.text.count("row groups of 4 clips") == 1 and len(again) == 6
    shard_files.row_group.cache_clear()
    for index, clip in enumerate(clips):
        assert torch.equal(shards.read(index)["latents"], clip)
    assert shard_files.row_group.cache_info().misses == 2
    with caplog.at_level(logging.WARNING):
        LatentShards(tmp_path / "ours")
    assert "ours" not in caplog.text
    assert shards.caption(0) == ""
