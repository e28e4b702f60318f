"""Sets up Accelerate for a stage: precision, devices, processes and trackers."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    parse_flag_from_env,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..devices import has_gpu
from .stages.base import StageConfig
from .trackers import tracker_names

# How many numbers DeepSpeed reduces or gathers at once; its default of 500 million would take 2 GB in float32.
BUCKET = 50_000_000


class StageModule(nn.Module):
    """The module that Accelerate wraps: a network called `name`, with the `others` that its loss needs.

    Its forward calls a function of all networks in the context that `precision` makes. Gradient
    synchronization, sharding and autocast therefore cover `forward`, `forward_chunk` and anything else a loss calls,
    without patching the network. Autocast is applied inside because not every wrapper applies it or passes it on.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        others: Mapping[str, nn.Module],
        precision: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        super().__init__()
        self.network = network
        self.name = name
        self.precision = precision
        # In a plain dict, the other networks are hidden from the optimizer, the checkpoint and DDP.
        self.others = dict(others)

    @property
    def _no_split_modules(self) -> list[str] | None:
        """The class names of the blocks, at which Accelerate shards."""
        names: list[str] | None = getattr(self.network, "_no_split_modules", None)
        return names

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(models, *arguments)`, with the models by name."""
        with self.precision():
            return function({**self.others, self.name: self.network}, *arguments)


def autocast(
    device: torch.device, mixed_precision: str, sharded: bool = False
) -> contextlib.AbstractContextManager[None]:
    """The autocast context of a stage with this `mixed_precision` on `device`.

    Casts of a `sharded` network are not cached: they would outlive the weights that were gathered for a block.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype, cache_enabled=not sharded)


def open_accelerator(config: StageConfig, work_dir: Path) -> Accelerator:
    """An Accelerator with the stage's settings, which `check_launch` must have accepted."""
    # Accelerate keeps one precision per process, but stages may differ. The reset keeps the process group.
    AcceleratorState._reset_state()
    # With a precision set, DeepSpeed would store the weights in it.
    zero = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    accelerator = Accelerator(
        # Accelerate would train on MPS, where nothing else runs.
        cpu=torch.accelerator.is_available() and not has_gpu(),
        mixed_precision="no" if zero else config.mixed_precision,
        gradient_accumulation_plugin=_accumulation(config),
        log_with=tracker_names(config) or None,
        project_dir=work_dir,
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                find_unused_parameters=config.partial_gradients, gradient_as_bucket_view=True, broadcast_buffers=False
            )
        ],
    )
    if accelerator.is_fsdp2:
        # Weights stay float32 and autocast computes in the lower precision, as without sharding.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    if splits_optimizer(accelerator):
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = config.batch_size
        settings["gradient_accumulation_steps"] = config.grad_accumulation
        settings["zero_optimization"] |= {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    return accelerator


def _accumulation(config: StageConfig) -> GradientAccumulationPlugin:
    """The stage's gradient accumulation, passed explicitly so that the launcher's environment cannot replace it.

    A sharded network reduces gradients after every micro-batch, because unreduced ones would be full-size.
    """
    return GradientAccumulationPlugin(
        num_steps=config.grad_accumulation, sync_each_batch=parse_flag_from_env("ACCELERATE_USE_FSDP")
    )


def splits_optimizer(accelerator: Accelerator) -> bool:
    """Whether `accelerator` partitions the optimizer over the processes (DeepSpeed's ZeRO-2)."""
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


def free_memory() -> None:
    """Free what models that are no longer needed occupy: reference cycles, and torch's cache of GPU memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fast_attention(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """A context that uses plain matmuls on the CPU, where the backward of fused attention is slow at small sizes."""
    if device.type == "cpu":
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()
