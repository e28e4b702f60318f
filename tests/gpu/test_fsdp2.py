"""FSDP2 through Accelerate, which needs GPUs: sharded stages equal whole ones, resume and end plain.

`python -m pytest tests/gpu/test_fsdp2.py` on a machine with two GPUs or more. It has not been run yet.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = """
import contextlib, os, sys
from pathlib import Path
import torch
import distill_case as case

folder, settings = Path(sys.argv[1]), {"trainable": "all", "mixed_precision": "bf16"}
_, whole = case.train(folder / "whole", **settings)
with contextlib.suppress(case.Killed):
    case.train(folder / "resumed", 15.0, **settings)
result, weights = case.train(folder / "resumed", **settings)
assert result.resumed_from == 3
assert all(type(tensor) is torch.Tensor for tensor in weights.values())
# Reductions on GPUs need not be deterministic.
assert max(float((weights[name] - tensor).abs().max()) for name, tensor in whole.items()) < 1e-3
assert (folder / "whole" / "checkpoints" / "step-00000008" / "shards").is_dir()
if os.environ["RANK"] == "0":
    torch.save(whole, folder / "weights.pt")
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="FSDP2 through Accelerate needs two GPUs")
def test_a_sharded_stage_equals_ddp(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    weights = []
    for name in ("ddp", "fsdp2"):
        config = ROOT / "recipes" / "accelerate" / f"{name}.yaml"
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        command = [*launcher, "--num_processes", "2", str(tmp_path / "train.py"), str(tmp_path / name)]
        # Only a sharded stage writes shards.
        wanted = "assert (folder" if name == "fsdp2" else "assert not (folder"
        (tmp_path / "train.py").write_text(SCRIPT.replace("assert (folder", wanted))
        subprocess.run(command, env=environment, check=True, timeout=900)
        weights.append(torch.load(tmp_path / name / "weights.pt", map_location="cpu"))
    ddp, sharded = weights
    assert max(float((sharded[name] - tensor).abs().max()) for name, tensor in ddp.items()) < 1e-3
