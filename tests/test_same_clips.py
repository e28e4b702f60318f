"""A run continues with the clips that it began with, because more clips would be split and drawn differently."""

from __future__ import annotations

import json

import distill_case as case
import pico
import pytest
from recipe_case import digests
from test_skipped_clips import TEXT, clips, recipe

from mla_convert.distill import trainer
from mla_convert.distill.clip_shards import write_latents
from mla_convert.distill.data import DataConfig, DigitClips, open_data
from mla_convert.distill.trainer import run_stage
from mla_convert.errors import UserError
from mla_convert.pipeline import run
from mla_convert.pipeline import steps as steps_module
from mla_convert.pipeline.evaluation import evaluate_checkpoint

REMEDY = r"restore the shards of data\.folder, or start over with another --out"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    pico.dense_model(in_channels=1, out_channels=1, text_dim=TEXT[1]).save_pretrained(folder)
    return folder


def grow(folder):
    write_latents(folder, clips(3), clips_per_shard=4, first_shard=3)
    return folder / "shard-00003.parquet"


def identity(folder):
    return open_data(DataConfig(kind="latents", folder=str(folder), heldout=2), seed=0).identity


def test_clips_are_known_by_names_and_sizes_of_their_shards(tmp_path):
    for name in ("one", "same"):
        write_latents(tmp_path / name, clips(), clips_per_shard=4)
    found = identity(tmp_path / "one")
    assert found == identity(tmp_path / "same") and (found["clips"], found["shards"]) == (10, 3)
    (tmp_path / "same" / "shard-00000.parquet").rename(tmp_path / "same" / "other.parquet")
    assert identity(tmp_path / "same") != found
    write_latents(tmp_path / "cut", clips(), clips_per_shard=5)
    assert identity(tmp_path / "cut") != found
    assert DigitClips(0).identity is None


def test_a_run_is_refused_more_clips_until_they_are_gone(teacher, tmp_path):
    write_latents(tmp_path / "data", clips(), clips_per_shard=4)
    own = recipe(teacher, tmp_path / "data", "convert.init=activation")
    run(own, tmp_path / "run", until="convert")
    more, before = grow(tmp_path / "data"), digests(tmp_path / "run")
    line = rf"run was begun with other clips: 10 clips in 3 shards then, 13 clips in 4 shards now; {REMEDY}"
    with pytest.raises(UserError, match=line):
        run(own, tmp_path / "run", resume=True)
    assert digests(tmp_path / "run") == before

    more.unlink()
    run(own, tmp_path / "run", resume=True, until="distill")


def test_a_conversion_that_was_killed_begins_anew_with_more_clips(teacher, tmp_path, monkeypatch):
    """No step is done yet, so nothing is mixed, and its layers are fitted again."""
    write_latents(tmp_path / "data", clips(), clips_per_shard=4)
    own = recipe(teacher, tmp_path / "data", "convert.init=activation")
    converted = []

    def convert_source(*given, identity, **settings):
        converted.append(identity["clips"])
        raise UserError("killed")

    monkeypatch.setattr(steps_module, "convert_source", convert_source)
    for _ in range(2):
        with pytest.raises(UserError, match="killed"):
            run(own, tmp_path / "run", resume=True)
        grow(tmp_path / "data")
    assert [found["clips"] for found in converted] == [10, 13]


def test_a_stage_is_refused_more_clips(tmp_path):
    write_latents(tmp_path / "data", clips(8, shape=(1, 9, 16, 16)), clips_per_shard=4)

    def train(steps):
        data = open_data(DataConfig(kind="latents", folder=str(tmp_path / "data"), heldout=2), seed=0)
        model = case.tiny_model()
        config = case.make_config(steps=steps, checkpoint_every=1)
        return run_stage(config, model, {"teacher": case.tiny_model()}, data, None, tmp_path / "work", 0, 0)

    train(2)
    write_latents(tmp_path / "data", clips(2, shape=(1, 9, 16, 16)), first_shard=2)
    with pytest.raises(UserError, match=rf"step-00000002 was trained on other clips: 8 clips in 2 .*, 10 .*; {REMEDY}"):
        train(2)
    (tmp_path / "data" / "shard-00002.parquet").unlink()
    assert train(2).resumed_from == 2


def test_processes_that_see_other_clips_do_not_train(tmp_path, monkeypatch):
    """As on NFS, or while shards are still being written."""
    write_latents(tmp_path / "data", clips(8, shape=(1, 9, 16, 16)), clips_per_shard=4)
    data = open_data(DataConfig(kind="latents", folder=str(tmp_path / "data"), heldout=2), seed=0)
    monkeypatch.setattr(trainer, "from_main", lambda value: {**value, "clips": 12})
    networks = {"teacher": case.tiny_model()}
    with pytest.raises(UserError, match=r"the processes do not see the same clips in data\.folder"):
        run_stage(case.make_config(steps=1), case.tiny_model(), networks, data, None, tmp_path / "work", 0, 0)
    assert not (tmp_path / "work").exists()


def test_an_evaluation_is_refused_more_clips(teacher, tmp_path):
    """Some of its held-out clips were used for training."""
    write_latents(tmp_path / "data", clips(), clips_per_shard=4)
    run(recipe(teacher, tmp_path / "data", "distill=[]"), tmp_path / "run", until="export")
    more = grow(tmp_path / "data")
    checkpoint, silent = tmp_path / "run" / "checkpoint", lambda *_: None
    with pytest.raises(UserError, match="begun with other clips: 10 clips in 3 shards then, 13 clips in 4"):
        evaluate_checkpoint(checkpoint, None, None, {}, silent)
    assert not (tmp_path / "run" / "evaluation").exists()
    more.unlink()
    page, _ = evaluate_checkpoint(checkpoint, None, None, {}, silent)
    assert page.is_file()


def test_another_number_of_processes_names_the_key_that_allows_it(tmp_path, monkeypatch):
    case.train(tmp_path, steps=1)
    (path,) = (tmp_path / "checkpoints").glob("*/state.json")
    state = json.loads(path.read_text())
    state["identity"]["processes"] = 8
    path.write_text(json.dumps(state))
    with pytest.raises(
        UserError,
        match=r"was made with processes 8, not 1; launch as many processes as before .only global_batch",
    ):
        case.train(tmp_path, steps=1)
