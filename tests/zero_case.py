"""One process of a stage under DeepSpeed on the CPU.

Accelerate supports DeepSpeed with several processes only on GPUs. Here it is told about its process afterwards;
everything else, DeepSpeed itself included, is as it is.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import distill_case as case
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from mla_convert.cli import leave_processes
from mla_convert.distill import launch, runtime


class Launched(Accelerator):
    """An Accelerator that knows how many processes there are."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        rank = int(os.environ["RANK"])
        for state in (PartialState._shared_state, AcceleratorState._shared_state):
            state.update(num_processes=2, process_index=rank, local_process_index=rank)


def main(folder: str, last_clip: str, changes: str) -> None:
    """Train in `folder/whole`, and in `folder/resumed` with an interruption after clip `last_clip`."""
    torch.set_num_threads(1)
    os.environ |= {"ACCELERATE_USE_CPU": "false", "ACCELERATE_USE_DEEPSPEED": "true"}
    launch.has_gpu = lambda: True
    runtime.Accelerator = Launched
    for name, settings in json.loads(changes).items():
        weights = case.whole_and_resumed(Path(folder, name), float(last_clip), **settings)
        # The engine's one tensor of all weights is gone.
        assert len({tensor.untyped_storage().data_ptr() for tensor in weights.values()}) == len(weights)


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_processes()
