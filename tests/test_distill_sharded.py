"""A sharded student trains as a whole one does, is saved in shards, resumes exactly and ends as a plain model."""

from __future__ import annotations

import distill_case as case
import pytest
import sharded_case

SETTINGS = {
    "adapters": {"trainable": "attention", "lora": {"rank": 2, "alpha": 2}, "gradient_checkpointing": True},
    # The average and the start are networks of their own here.
    "consistency": {"stage": "consistency", "teacher": "start", "trainable": "all", "steps": 5},
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Every stage, whole and resumed, in two processes that are started once."""
    folder = tmp_path_factory.mktemp("sharded")
    launched = case.two_processes(folder, 15, script=sharded_case.__file__, **SETTINGS)
    assert launched.returncode == 0
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_two_shards_equal_one_process(sharded, tmp_path, name):
    # Adam turns the rounding of another order of sums into steps where the gradient is near zero.
    case.assert_as_one_process(sharded / name, tmp_path, 1e-4, **SETTINGS[name])


@pytest.mark.parametrize("name", SETTINGS)
def test_shards_resume_exactly(sharded, name):
    whole, resumed = (sharded / name / folder for folder in ("whole", "resumed"))
    assert (whole / "metrics.jsonl").read_bytes() == (resumed / "metrics.jsonl").read_bytes()
    (newest, *_) = sorted((whole / "checkpoints").iterdir(), reverse=True)
    assert len(list((newest / "shards").glob("*.distcp"))) == 2
