"""Data workers read ahead what a stage would read itself, from shards too, if there is memory to hand it over in."""

from __future__ import annotations

import shutil
from typing import Any, NamedTuple

import distill_case as case
import pytest
import torch
from accelerate import Accelerator

from mla_convert.distill import feed as feeding
from mla_convert.distill.clip_shards import Clip, write_latents
from mla_convert.distill.data import DataConfig, LatentClips, open_data
from mla_convert.recipe.load import load_recipe
from mla_convert.recipe.shipped import shipped_recipes


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("clips")
    generator = torch.Generator().manual_seed(0)
    clips = (
        Clip(torch.randn(4, 3, 2, 2, generator=generator).bfloat16(), torch.randn(3, 8, generator=generator), str(i))
        for i in range(9)
    )
    write_latents(folder, clips, clips_per_shard=4)
    opened = open_data(DataConfig(kind="latents", folder=str(folder), heldout=1, latents="normalized"), seed=0)
    assert isinstance(opened, LatentClips)
    return opened


def fed(data: Any, workers: int, first: int) -> list[dict[str, torch.Tensor]]:
    """All micro-batches of a stage from step `first` on."""
    config = case.make_config(data_workers=workers, grad_accumulation=2)
    updates = feeding.feed(Accelerator(cpu=True), config, data, 0, 0, 1, first)
    return [batch.clips for update in updates for batch in update.batches]


@pytest.mark.parametrize("first", [0, 5])
def test_workers_read_the_same_clips(data, first):
    expected, found = fed(data, 0, first), fed(data, 2, first)
    assert len(found) == len(expected) == 2 * (8 - first)
    for batch, other in zip(found, expected, strict=True):
        assert batch.keys() == other.keys()
        assert all(torch.equal(batch[name], other[name]) for name in batch)


class Usage(NamedTuple):
    free: int


# A clip has 4 x 3 x 2 x 2 numbers of latents and 3 x 8 of text. Two workers hold two micro-batches of two clips each.
NEEDED = 4 * (48 + 24) * 2 * 2 * 2


@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("lacking", [0, 1])
def test_without_enough_shared_memory_there_are_none(data, processes, lacking, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(feeding, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(processes * NEEDED - lacking))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    config = case.make_config(data_workers=2)
    assert feeding.data_workers(config, data) == (0 if lacking else 2)
    assert ("so clips are read between the steps; give a container more" in caplog.text) == bool(lacking)


def test_systems_without_this_folder_keep_their_workers(data, monkeypatch, tmp_path):
    monkeypatch.setattr(feeding, "SHARED_MEMORY", tmp_path / "none")
    assert feeding.data_workers(case.make_config(data_workers=2), data) == 2


def test_recipes_of_published_models_have_workers():
    found = {
        name: {stage.data_workers for stage in load_recipe(path).distill} for name, path in shipped_recipes().items()
    }
    without = {name for name, workers in found.items() if workers == {0}}
    assert without == {"bench/digits", "bench/stages", "demo"}
    assert all(found[name] == {2} for name in found.keys() - without)
