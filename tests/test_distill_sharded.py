"""A sharded student trains as a whole one does, is saved in shards, resumes exactly and ends as a plain model."""

from __future__ import annotations

import distill_case as case
import pytest
import sharded_case

# The average and the start of `consistency` are networks of their own here.
SHARDED = case.IN_PARTS
DMD = {"stage": "dmd", "denoising_steps": [1000, 500], "critic_updates": 1, "score_attention": "bidirectional"}
TWO = {"dmd": {**DMD, "steps": 5, "batch_size": 1, "gradient_checkpointing": True, "trainable": "all"}}
FROZEN = {"frozen": {**DMD, "shard_frozen": True, "steps": 5, "batch_size": 1}}
SETTINGS = {**SHARDED, **TWO, **FROZEN}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return case.trained_by_two(tmp_path_factory.mktemp("sharded"), sharded_case.__file__, SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_two_shards_equal_one_process(sharded, tmp_path, name):
    # Adam turns the rounding of another order of sums into steps where the gradient is near zero.
    case.assert_as_one_process(sharded / name, tmp_path, 1e-4, **SETTINGS[name])


@pytest.mark.parametrize("name", {**SHARDED, **TWO})
def test_shards_resume_exactly(sharded, name):
    newest, _ = case.equal_checkpoints(sharded / name)
    for folder in ["shards", *(["second-shards"] if name in TWO else [])]:
        assert len(list((newest / folder).glob("*.distcp"))) == 2
