"""A sharded student whose layers share a latent: blocks get copies of what they are called with, and must not mind."""

from __future__ import annotations

import distill_case as case
import pytest
import sharded_case

LATENTS = {"layers_per_latent": 2, "trainable": "all", "steps": 5}
SETTINGS = {
    "plain": LATENTS,
    "bf16_checkpointed": {**LATENTS, "mixed_precision": "bf16", "gradient_checkpointing": True},
    # With an exact own chunk, the weights that write the cache never get a gradient.
    "dmd": {**LATENTS, **sharded_case.DMD, "batch_size": 1, "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return case.trained_by_two(tmp_path_factory.mktemp("sharded"), sharded_case.__file__, SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_two_shards_equal_one_process(sharded, tmp_path, name):
    # In bfloat16, autocast adds up the gradients of a weight's uses before it widens them; in shards, after.
    weights, metrics = (2e-2, 2e-2) if "bf16" in name else (1e-4, 1e-3)
    case.assert_as_one_process(sharded / name, tmp_path, weights, metrics, **SETTINGS[name])


@pytest.mark.parametrize("name", SETTINGS)
def test_shards_resume_exactly(sharded, name):
    newest, _ = case.equal_checkpoints(sharded / name)
    assert len(list((newest / "shards").glob("*.distcp"))) == 2
