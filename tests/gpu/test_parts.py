"""FSDP2 and DeepSpeed through Accelerate, which needs GPUs: stages equal unsharded ones, resume and end unsharded.

`python -m pytest tests/gpu/test_parts.py` on a machine with two GPUs or more. It has not been run yet.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = """
import contextlib, json, os, sys
from pathlib import Path
import torch
import distill_case as case

folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
_, whole = case.train(folder / "whole", **settings)
with contextlib.suppress(case.Killed):
    case.train(folder / "resumed", 15.0, **settings)
result, weights = case.train(folder / "resumed", **settings)
assert result.resumed_from == 3
assert all(type(tensor) is torch.Tensor for tensor in weights.values())
# Reductions on GPUs need not be deterministic.
assert max(float((weights[name] - tensor).abs().max()) for name, tensor in whole.items()) < 1e-3
checkpoint = folder / "whole" / "checkpoints" / "step-00000008"
assert [name for name in ("shards", "second-shards", "optimizer") if (checkpoint / name).is_dir()] == sys.argv[3:]
if os.environ["RANK"] == "0":
    torch.save(whole, folder / "weights.pt")
"""


PLAIN = {"trainable": "all", "mixed_precision": "bf16"}
DMD = {**PLAIN, "stage": "dmd", "denoising_steps": [1000, 500], "critic_updates": 1, "batch_size": 1}
SHARED = {**PLAIN, "layers_per_latent": 2}
LAUNCHES = [
    ("fsdp2", PLAIN, ["shards"]),
    ("fsdp2", SHARED, ["shards"]),
    ("fsdp2", {**SHARED, "gradient_checkpointing": True}, ["shards"]),
    ("fsdp2", DMD, ["shards", "second-shards"]),
    ("fsdp2", {**DMD, "layers_per_latent": 2, "gradient_checkpointing": True}, ["shards", "second-shards"]),
    ("deepspeed-zero2", PLAIN, ["optimizer"]),
]
"""A configuration, a stage, and the folders of a checkpoint that processes write together."""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="FSDP2 and DeepSpeed through Accelerate need two GPUs")
@pytest.mark.parametrize(("name", "settings", "parts"), LAUNCHES)
def test_a_stage_in_parts_equals_ddp(tmp_path, name, settings, parts):
    if name == "deepspeed-zero2":
        pytest.importorskip("deepspeed")
    (tmp_path / "train.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    weights = []
    for launch, folders in (("ddp", []), (name, parts)):
        config = ROOT / "recipes" / "accelerate" / f"{launch}.yaml"
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        command = [*launcher, "--num_processes", "2", str(tmp_path / "train.py"), str(tmp_path / launch)]
        subprocess.run([*command, json.dumps(settings), *folders], env=environment, check=True, timeout=900)
        weights.append(torch.load(tmp_path / launch / "weights.pt", map_location="cpu"))
    ddp, parted = weights
    assert max(float((parted[name] - tensor).abs().max()) for name, tensor in ddp.items()) < 1e-3
