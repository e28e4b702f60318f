"""A damaged clip is named and ends the run; `data.skip` lets it continue, in the same order."""

from __future__ import annotations

import json
import logging

import pico
import pytest
import torch
from pydantic import ValidationError
from recipe_case import RECIPE, digests
from torch.utils.data import DataLoader, Dataset

from mla_convert.distill.clip_shards import Clip, write_latents
from mla_convert.distill.data import DataConfig, open_data, without_worker_traceback
from mla_convert.errors import UsageError, UserError
from mla_convert.pipeline import run
from mla_convert.recipe.load import parse_recipe

TEXT = (3, 32)
BAD = 5


def clips(count=10, bad=(), shape=(1, 6, 8, 8)):
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        latents, text = torch.randn(shape, generator=generator), torch.randn(TEXT, generator=generator)
        if number in bad:
            latents[0, 1, 2, 3] = float("nan")
        made.append(Clip(latents, text, name=f"v{number}.mp4"))
    return made


def opened(folder, heldout=3, **settings):
    return open_data(
        DataConfig(kind="latents", folder=str(folder), heldout=heldout, **{"split": "last", **settings}), seed=0
    )


def number_of(example, made):
    """The number of the clip that an example is."""
    (found,) = [n for n, clip in enumerate(made) if torch.equal(clip.latents, example["latents"])]
    return found


def test_the_error_names_clip_and_shard(tmp_path):
    made = clips(bad=[1])
    made[7].encoder_hidden_states[0, 0] = float("inf")
    write_latents(tmp_path, made, clips_per_shard=4)
    data = opened(tmp_path)
    line = (
        r"clip 1 of .*shard-00000\.parquet, 'v1\.mp4', has NaN or infinite values in its latents; .*data\.skip: \[1\]"
    )
    with pytest.raises(UserError, match=line):
        [data.example(index) for index in range(7)]
    with pytest.raises(UserError, match=r"clip 3 of .*shard-00001.*'v7\.mp4', .* in its text embedding; .*skip: \[7\]"):
        data.heldout()


def test_the_next_clip_stands_in_and_the_others_stay(tmp_path):
    made = clips()
    write_latents(tmp_path, made, clips_per_shard=4)
    whole, less = opened(tmp_path), opened(tmp_path, skip=(2, "v3.mp4", 6, "v8.mp4"))
    assert less.size == whole.size == 7
    before, after = ([number_of(data.example(i), made) for i in range(7)] for data in (whole, less))
    assert sorted(before) == list(range(7))
    assert [a for a, b in zip(after, before, strict=True) if b not in (2, 3, 6)] == [b for b in before if b in after]
    assert not {2, 3, 6} & set(after)
    held = [number_of({"latents": latents}, made) for latents in less.heldout()["latents"]]
    assert held == [7, 9]
    assert len(less.heldout(1)["latents"]) == 1


def test_a_name_that_is_not_there_is_refused(tmp_path):
    write_latents(tmp_path, clips(4))
    for entry in (4, -1, "v9.mp4"):
        with pytest.raises(UserError, match=rf"data\.skip: .* has no clip {entry!r}; it has 4, counted from 0"):
            opened(tmp_path, heldout=1, skip=(entry,))
    with pytest.raises(UserError, match=r"data\.skip leaves no clips to hold out"):
        opened(tmp_path, heldout=1, skip=(3,))
    with pytest.raises(UserError, match=r"data\.skip leaves no clips to train on"):
        opened(tmp_path, heldout=1, skip=(0, 1, 2))
    with pytest.raises(ValidationError, match="kind digits reads none; leave it out"):
        DataConfig(skip=(1,))


def test_damaged_clips_do_not_decide_what_latents_are(tmp_path, caplog):
    write_latents(tmp_path, clips(4, bad=[0, 2], shape=(16, 3, 8, 8)))
    with caplog.at_level(logging.WARNING):
        assert opened(tmp_path, heldout=1, skip=(0, 2)).size == 3
    assert caplog.text == ""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    pico.dense_model(in_channels=1, out_channels=1, text_dim=TEXT[1]).save_pretrained(folder / "teacher")
    return folder / "teacher"


def recipe(teacher, folder, *overrides):
    text = RECIPE.format(teacher=teacher).split("generate:")[0].replace("rollout_prompts: 2", "rollout_prompts: 0")
    text = text.replace("kind: digits\n  heldout: 4", f"kind: latents\n  folder: {folder}\n  heldout: 2")
    return parse_recipe(text, ["convert.init=random", "distill.0.batch_size=2", *overrides])


class Broken(Dataset):
    def __getitem__(self, index):
        raise UserError(f"clip {index} of a shard: it is damaged")


def test_a_loader_process_says_it_in_one_line():
    loader = DataLoader(Broken(), batch_sampler=[[2]], num_workers=1)
    with pytest.raises(UserError) as error:
        next(without_worker_traceback(loader))
    assert str(error.value) == "clip 2 of a shard: it is damaged"


def test_a_run_goes_on_without_the_clip_that_ended_it(teacher, tmp_path):
    made = clips(bad=[BAD])
    write_latents(tmp_path / "bad", made)
    extra = ("distill.0.checkpoint_every=1",)
    with pytest.raises(UserError, match=rf"clip {BAD} of .*data\.skip: \[{BAD}\]") as error:
        run(recipe(teacher, tmp_path / "bad", *extra), tmp_path / "run", until="distill")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=rf"clip {BAD} of "):
        run(recipe(teacher, tmp_path / "bad", *extra), tmp_path / "run", resume=True, until="distill")
    with pytest.raises(UsageError, match=r"another recipe: data\.heldout was 2"):
        run(recipe(teacher, tmp_path / "bad", "data.heldout=3"), tmp_path / "run", resume=True, until="distill")

    skipping = recipe(teacher, tmp_path / "bad", *extra, f"data.skip=[{BAD}]")
    resumed = run(skipping, tmp_path / "run", resume=True, until="distill")
    unbroken = run(skipping, tmp_path / "unbroken", until="distill")

    assert digests(resumed.model / "transformer") == digests(unbroken.model / "transformer")
    assert json.loads((tmp_path / "run" / "state.json").read_text())["recipe"]["data"]["skip"] == [BAD]
    run(skipping, tmp_path / "run", resume=True, until="distill")


def test_skip_is_a_list_of_numbers_and_names(teacher, tmp_path):
    assert recipe(teacher, tmp_path, "data.skip=[3, a/b.mp4]").data.skip == (3, "a/b.mp4")
    with pytest.raises(UsageError, match=r"data\.skip"):
        recipe(teacher, tmp_path, "data.skip=[1.5]")
