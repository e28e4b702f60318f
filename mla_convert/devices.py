"""Choose where models run, how many CPU threads they use, and load offloaded weights."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch


def has_gpu() -> bool:
    """Whether there is a GPU to compute on: one that torch calls cuda, as ROCm builds do too.

    Everything runs there or on the CPU. Apple's MPS and other accelerators are not used: nothing was tried on them.
    """
    return torch.cuda.is_available()


def default_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if has_gpu() else "cpu")


def lacks_bfloat16(device: torch.device) -> bool:
    """Whether torch has no fused attention in bfloat16 on a GPU, as below compute capability 8.0 (T4, V100)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) < (8, 0)


def widest(device: torch.device) -> torch.dtype:
    """The widest floating point dtype of a device: float64, but float32 on Apple's MPS, which has no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def usable_cpus() -> int:
    """How many CPU cores this process may use; all of the machine's where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes_here() -> int:
    """How many processes of this launch run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


@contextlib.contextmanager
def all_threads() -> Iterator[None]:
    """Use all CPU threads for work that one process of a launcher does alone; launchers allow each process only one."""
    before = torch.get_num_threads()
    if "LOCAL_WORLD_SIZE" in os.environ:
        torch.set_num_threads(max(before, usable_cpus()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bring_weights(module: Any) -> None:
    """Run a module's offloading hook now; a VAE's `encode` and `decode` run it only after `vae.device` was read."""
    if hasattr(getattr(module, "_hf_hook", None), "pre_forward"):
        module._hf_hook.pre_forward(module)
