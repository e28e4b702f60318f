"""Accelerate as a stage uses it: precision, devices, processes and trackers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UserError
from .data import Batch
from .stages.base import Models, StageConfig

Loss = Callable[[Models, Batch, torch.Generator], tuple[Tensor, dict[str, Tensor]]]


class StageModule(nn.Module):
    """A network called `name` together with its `loss`, so that Accelerate wraps every way in which that calls it.

    Gradient synchronisation and autocast then hold for `forward`, `forward_chunk` and whatever else
    a loss uses, and the network itself is not patched.
    """

    def __init__(self, loss: Loss, name: str, network: nn.Module, others: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.network = network
        self.name, self.loss = name, loss
        # A plain dict hides the other networks from the optimizer, the checkpoint and DDP.
        self.others = dict(others)

    def forward(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss({**self.others, self.name: self.network}, batch, generator)


def open_accelerator(config: StageConfig, work_dir: Path) -> Accelerator:
    """An Accelerator with the stage's precision. Raises UserError when the device cannot do it."""
    # Accelerate keeps one precision a process; stages may differ in theirs. The process group stays.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.grad_accumulation,
        log_with=config.tracker,
        project_dir=work_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=config.partial_gradients)],
    )
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("mixed_precision: fp16 needs a GPU; use bf16 or no on the CPU")
    return accelerator


@contextlib.contextmanager
def tracking(accelerator: Accelerator, config: StageConfig, first: int) -> Iterator[None]:
    """Log to the stage's tracker from step `first` on; what it had seen after that step is forgotten."""
    if config.tracker is not None:
        accelerator.init_trackers(config.tracker, init_kwargs={"tensorboard": {"purge_step": first + 1}})
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def fast_attention(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """On the CPU the backward of fused attention is slower than plain matmuls at small sizes."""
    if device.type == "cpu":
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()
