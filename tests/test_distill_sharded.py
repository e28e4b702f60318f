"""A sharded student trains as a whole one does, is saved in shards, resumes exactly and ends as a plain model."""

from __future__ import annotations

import distill_case as case
import pytest
import sharded_case

# The average and the start of `consistency` are networks of their own here.
SHARDED = case.IN_PARTS
DMD = sharded_case.DMD
TWO = {"dmd": {**DMD, "steps": 5, "batch_size": 1, "gradient_checkpointing": True, "trainable": "all"}}
CONTINUED = {"continued": {**TWO["dmd"], "fake_score": "previous", "second_start": "dmd/whole/fake_score.safetensors"}}
FROZEN = {"frozen": {**DMD, "shard_frozen": True, "steps": 5, "batch_size": 1}}
SETTINGS = {**SHARDED, **TWO, **CONTINUED, **FROZEN}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return case.trained_by_two(tmp_path_factory.mktemp("sharded"), sharded_case.__file__, SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_two_shards_equal_one_process(sharded, tmp_path, name):
    settings = dict(SETTINGS[name])
    if "second_start" in settings:
        settings["second_start"] = sharded / settings["second_start"]
    # Adam turns the rounding of another order of sums into steps where the gradient is near zero.
    case.assert_as_one_process(sharded / name, tmp_path, 1e-4, **settings)


@pytest.mark.parametrize("name", {**SHARDED, **TWO, **CONTINUED})
def test_shards_resume_exactly(sharded, name):
    newest, _ = case.equal_checkpoints(sharded / name)
    trains_two = SETTINGS[name].get("stage") == "dmd"
    for folder in ["shards", *(["second-shards"] if trains_two else [])]:
        assert len(list((newest / folder).glob("*.distcp"))) == 2
    whole, resumed = (sharded / name / run / "fake_score.safetensors" for run in ("whole", "resumed"))
    assert whole.is_file() == resumed.is_file() == trains_two
    assert not trains_two or whole.read_bytes() == resumed.read_bytes()
