"""One process of a stage whose student is sharded by plain `fully_shard` on the CPU, or its frozen networks alone.

Accelerate shards on GPUs only. Here its `prepare` is replaced by what it does there, on a gloo mesh;
everything else is the trainer as it is.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import distill_case as case
import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from mla_convert.cli import leave_processes
from mla_convert.distill import assembly, trainer

# Rollouts of two chunks, of which the second one reads what the first one has cached.
DMD = {"stage": "dmd", "denoising_steps": [1000, 500], "critic_updates": 1, "score_attention": "bidirectional"}
DMD |= {"rollout_frames": 6}


def prepare(accelerator: Accelerator, module: Any, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Shard `module` block by block and give the optimizer its new parameters."""
    mesh = init_device_mesh("cpu", (accelerator.num_processes,))
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    trained = [names[id(parameter)] for parameter in optimizer.param_groups[0]["params"]]
    for block in module.network.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    optimizer.param_groups[0]["params"] = [module.get_parameter(name) for name in trained]
    assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
    return module, accelerator.prepare_optimizer(optimizer)


class Watched(assembly.Assembly):
    """Frozen networks of which nothing lies whole in a process, and a student that is like them where it is sharded."""

    def __init__(self, *inputs: Any) -> None:
        super().__init__(*inputs)
        assert self.frozen
        in_shards = self.frozen if self.config.shard_frozen else [*self.under_training, *self.frozen]
        for network in in_shards:
            assert all(isinstance(parameter, DTensor) for parameter in network.parameters())
        assert not any(isinstance(parameter, DTensor) for parameter in self.student.parameters())


def counted(relative_distance: Any, weights: Any, others: Any) -> float:
    """The distance of the average, which takes one collective for any number of sharded tensors."""
    with CommDebugMode() as communication:
        found: float = relative_distance(weights, others)
    assert communication.get_total_counts() == isinstance(next(iter(weights.values())), DTensor)
    return found


def main(folder: str, last_clip: str, changes: str) -> None:
    """Train in `folder/whole`, and in `folder/resumed` with an interruption after clip `last_clip`."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    trainer.Assembly, own = Watched, Accelerator.prepare
    trainer.relative_distance = functools.partial(counted, trainer.relative_distance)
    for name, settings in json.loads(changes).items():
        sharded = not settings.get("shard_frozen", False)
        assembly.shards_weights = lambda accelerator, sharded=sharded: sharded
        Accelerator.prepare = prepare if sharded else own
        if "second_start" in settings:
            settings |= {"second_start": str(Path(folder, settings["second_start"]))}
        case.whole_and_resumed(Path(folder, name), float(last_clip), **settings)


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_processes()
