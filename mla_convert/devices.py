"""Choose where models run, how many CPU threads they use, and load offloaded weights."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch


def default_device() -> torch.device:
    """Return the first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def all_threads() -> Iterator[None]:
    """Use all CPU threads for work that one process of a launcher does alone; launchers allow each process only one."""
    before = torch.get_num_threads()
    if "LOCAL_WORLD_SIZE" in os.environ:
        torch.set_num_threads(max(before, len(os.sched_getaffinity(0))))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bring_weights(vae: Any) -> None:
    """Run a VAE's offloading hook now; `encode` and `decode` run it only after their caller has read `vae.device`."""
    if hasattr(getattr(vae, "_hf_hook", None), "pre_forward"):
        vae._hf_hook.pre_forward(vae)
