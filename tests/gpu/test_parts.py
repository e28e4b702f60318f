"""What needs several GPUs: FSDP2 and DeepSpeed equal unsharded stages, and one video on two GPUs that on one.

`python -m pytest tests/gpu/test_parts.py` on a machine with two GPUs or more. It has not been run yet.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import share_case
import torch
from launched import launched

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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="processes that share chunks over NCCL need two GPUs")
def test_a_video_on_two_gpus_equals_one_on_one(tmp_path):
    done = launched(2, Path(share_case.__file__), str(tmp_path), "no", "cuda")
    assert all(one.code == 0 for one in done), [one.err for one in done]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    errors = {name: max(one[name] for one in found) for name in share_case.CASES if name in found[0]}
    # Kernels were found equal to torch by all processes, in their dtype; rounding in it adds up over steps.
    assert errors.pop(share_case.ON_GPU) < 5e-2
    # Quantized latents may round to the next step.
    assert all(error < 1e-3 for error in errors.values()), errors
