"""Held-out and calibration clips are drawn by the seed, because neighbors by name may be cuts of one film."""

from __future__ import annotations

import logging

import pico
import pytest
import torch
from pydantic import ValidationError

from mla_convert.convert import ConvertConfig, convert_model, initialize
from mla_convert.distill.clip_shards import Clip, write_latents
from mla_convert.distill.data import DataConfig, drawn_rows, open_data
from mla_convert.evaluate.config import EvaluateConfig
from mla_convert.evaluate.fidelity import evaluate
from mla_convert.families.wan import FAMILY

COUNT, HELDOUT = 40, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips whose first number is their place in the order of names."""
    made = [Clip(torch.full((2, 4, 4, 4), float(n)) + torch.rand(4, 4) / 9, torch.ones(3, 8)) for n in range(COUNT)]
    shards = tmp_path_factory.mktemp("clips")
    write_latents(shards, made, clips_per_shard=16)
    return shards


def opened(folder, seed=0, **settings):
    return open_data(DataConfig(kind="latents", folder=str(folder), heldout=HELDOUT, **settings), seed)


def places(latents):
    return [int(clip.flatten()[0]) for clip in latents]


def training(data):
    return places([data.example(index)["latents"] for index in range(data.size)])


def test_clips_are_drawn_by_the_seed(folder):
    data, again, other = opened(folder), opened(folder), opened(folder, seed=1)
    held, trained = places(data.heldout()["latents"]), training(data)
    assert sorted(held + trained) == list(range(COUNT)) and len(held) == HELDOUT
    assert held == places(again.heldout()["latents"]) and trained == training(again)
    assert set(held) != set(places(other.heldout()["latents"]))
    # Not neighbors: both halves of the folder are in both.
    for some in (held, trained[:HELDOUT]):
        assert min(some) < COUNT / 2 < max(some)
    assert places(data.heldout(3)["latents"]) == held[:3]


def test_the_last_ones_by_name_can_be_had(folder):
    data = opened(folder, split="last")
    assert places(data.heldout()["latents"]) == list(range(COUNT - HELDOUT, COUNT))
    assert training(data) == list(range(COUNT - HELDOUT))


def test_clips_that_are_left_out_change_no_other_place(folder):
    before, after = training(opened(folder)), training(opened(folder, skip=(7,)))
    changed = [place for place in range(len(before)) if before[place] != after[place]]
    assert [before[place] for place in changed] in ([7], [])
    assert all(after[place] == before[(place + 1) % len(before)] for place in changed)


def test_digits_have_no_split():
    with pytest.raises(ValidationError, match="digits are generated"):
        DataConfig(split="last")
    assert drawn_rows(5, 0) == drawn_rows(5, 0) != drawn_rows(5, 3)


def test_an_evaluation_holds_out_what_the_run_held_out(folder):
    """The section's own seed is for noise; the clips are those of the recipe's seed."""
    dense = pico.dense_model(in_channels=2, out_channels=2, text_dim=8)
    student = pico.convert(dense, kv_lora_rank=8)
    config = EvaluateConfig(clips=HELDOUT, batch_size=4, rollout_prompts=0, seed=5)
    data = DataConfig(kind="latents", folder=str(folder), heldout=HELDOUT)

    def losses(seed):
        return evaluate(student, dense, open_data(data, seed), config, lambda *_: None)["teacher_loss"]

    assert losses(1) == losses(1) != losses(0)


def test_too_few_tokens_are_said_once(caplog):
    initialize._warn_of_few.cache_clear()
    # A latent restores the keys and values of two heads of 12 channels.
    for tokens, said in ((40, 1), (48, 0)):
        caplog.clear()
        config = ConvertConfig(kv_lora_rank=4, calibration=pico.calibration(max_tokens=tokens))
        with caplog.at_level(logging.WARNING):
            convert_model(FAMILY, pico.dense_model(), config, pico.batches())
        assert caplog.text.count(f"{tokens} tokens, fewer than the 48 numbers that a latent restores") == said
