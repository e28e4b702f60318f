"""The parts of FSDP2 that `ShardedLearner` is made of: sharded networks, sharded checkpoints, gathered weights.

Trained and frozen networks are sharded block by block (`fully_shard`). These functions check the
network itself, so they work however it was sharded. A checkpoint is one folder of
torch.distributed.checkpoint, to which every process writes its part.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

from ..errors import UserError
from ..files import atomic_file, remove_left_behind, save_tensors
from .shard_reader import ShardPlanner, ShardReader
from .views import apart

_TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True)
_SOME = StateDictOptions(ignore_frozen_params=True, strict=False)


def shards_weights(accelerator: Accelerator) -> bool:
    """Whether `accelerator` shards the networks that it prepares."""
    return bool(accelerator.is_fsdp2)


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def frozen_shards(network: Any, mesh: DeviceMesh) -> Any:
    """A frozen model with the weights of the plain `network`, sharded over `mesh`; `network` itself stays whole."""
    return _in_shards(apart(network).eval().requires_grad_(False), mesh)


def trainable_shards(network: Any, mesh: DeviceMesh) -> Any:
    """A float32 copy of the plain, frozen `network`, to be trained on its own, sharded over `mesh`."""
    # Converted to float32 block by block, because a whole float32 copy would double the host memory.
    return _in_shards(copy.deepcopy(network).train().requires_grad_(True), mesh, torch.float32)


def _in_shards(network: Any, mesh: DeviceMesh, dtype: torch.dtype | None = None) -> Any:
    """Shard `network` in place, converted to `dtype` unless None, and return it."""
    for module in (*network.blocks, network):
        if dtype is not None:
            module.to(dtype)
        # A root that stays gathered would not see later changes of its weights.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return network


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of one that may be sharded; every process must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def over_parts(sums: Tensor, of: Tensor) -> Tensor:
    """Add up `sums`, computed on this process's part of tensors sharded like `of`, over all parts in one collective."""
    if not isinstance(of, DTensor):
        return sums
    placements = [Partial() if placement.is_shard() else Replicate() for placement in of.placements]
    return DTensor.from_local(sums, of.device_mesh, placements, run_check=False).full_tensor()


def forget_gathered(module: nn.Module) -> None:
    """Reshard after a forward without a backward, whose gathered weights would not see later changes."""
    if isinstance(module, FSDPModule):
        module.reshard()


@torch.no_grad()
def gather(weights: dict[str, Tensor], model: nn.Module) -> None:
    """Copy `weights` by name, sharded or not, into the plain `model`, one tensor at a time."""
    for name, weight in weights.items():
        model.get_parameter(name).copy_(whole(weight))


@torch.no_grad()
def write_whole(path: Path, model: nn.Module, main: bool) -> None:
    """Write all weights of `model`, sharded or not, to `path`, atomically; every process calls this, `main` writes.

    It holds them all in its host memory. What earlier processes that were killed left of such a file is removed.
    """
    gathered = ((name, whole(weight)) for name, weight in model.named_parameters())
    weights = {name: weight.detach().cpu().contiguous() for name, weight in gathered if main}
    if main:
        remove_left_behind(path)
        with atomic_file(path) as temporary:
            save_tensors(weights, temporary)


@torch.no_grad()
def read_whole(path: Path, model: nn.Module) -> None:
    """Read in place what `write_whole` wrote of a model of these shapes, sharded or not; every process calls this.

    Raises UserError if the file does not fit.
    """
    with safe_open(path, "pt") as file:
        names = {name for name, _ in model.named_parameters()}
        if names != set(file.keys()):
            raise UserError(
                f"{path} holds another network's weights; remove it and train the stage that wrote it again"
            )
        for name, weight in model.named_parameters():
            full = file.get_tensor(name).to(weight.device)
            if isinstance(weight, DTensor):
                full = distribute_tensor(full, weight.device_mesh, weight.placements)
            weight.copy_(full)


def save_shards(folder: Path, module: nn.Module, optimizer: Any, average: dict[str, Tensor] | None) -> None:
    """Write weights, optimizer and average to `folder`; every process calls this. Raises OSError for a full disk."""
    with _own_errors():
        dcp.save(_state(module, optimizer, average), checkpoint_id=folder)


def load_shards(folder: Path, module: nn.Module, optimizer: Any, average: dict[str, Tensor] | None) -> None:
    """Read back in place what `save_shards` wrote; every process calls this.

    Raises UserError if it is not plain data.
    """
    state = _state(module, optimizer, average)
    with _own_errors():
        # A parameter that never had a gradient has no state in the checkpoint, and must not get one here.
        stepped = {
            key.split(".", 2)[2].rpartition(".")[0] for key in _keys(folder) if key.startswith("optimizer.state.")
        }
        states = state["optimizer"]["state"]
        state["optimizer"]["state"] = {name: states[name] for name in states if name in stepped}
        dcp.load(state, storage_reader=ShardReader(folder), planner=ShardPlanner())
    set_model_state_dict(module, state["weights"], options=_SOME)
    set_optimizer_state_dict(module, optimizer, state["optimizer"], options=_SOME)


def _keys(folder: Path) -> list[str]:
    """The keys of a checkpoint, `weights.<name>`, `optimizer.state.<name>.exp_avg` and so on."""
    return list(ShardReader(folder).read_metadata().state_dict_metadata)


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Raise one process's error in every process: torch's CheckpointException is not an Exception subclass."""
    try:
        yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise next((cause for cause in causes if isinstance(cause, OSError)), causes[0]) from error


def _state(module: nn.Module, optimizer: Any, average: dict[str, Tensor] | None) -> dict[str, Any]:
    """The state dict of a checkpoint; an optimizer that has not stepped yet gets an initialized state."""
    state = {
        "weights": get_model_state_dict(module, options=_TRAINED_ONLY),
        "optimizer": get_optimizer_state_dict(module, optimizer, options=_TRAINED_ONLY),
    }
    return state if average is None else {**state, "average": average}


def from_main(value: Any) -> Any:
    """The first process's `value` in every process."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
