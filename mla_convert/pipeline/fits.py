"""Warns before a run starts if its training stages may not fit the GPU."""

from __future__ import annotations

import logging
import os

import torch
from accelerate.utils import parse_flag_from_env

from ..distill.footprint import Launch
from ..distill.launch import world_size
from ..errors import UserError
from ..recipe.schema import Recipe
from .dry_run import DryRun

ROOM = 0.95
"""Usable share of a GPU's memory; fragmentation and libraries take the rest."""

logger = logging.getLogger(__name__)


def warn_of_memory(recipe: Recipe, device: torch.device) -> None:
    """Log a warning for every stage that needs more memory than `device` or the launch's smallest GPU here has.

    The number is that of `--dry-run`, computed and not measured, so no run is refused.
    """
    if device.type != "cuda":
        return
    launch = Launch(
        world_size(), parse_flag_from_env("ACCELERATE_USE_FSDP"), parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    )
    try:
        needs = DryRun(recipe, launch).needs()
    except UserError:
        return
    available = least_memory(device)
    for need in needs:
        if need.memory_bytes > ROOM * available:
            largest = max(need.memory, key=need.memory.__getitem__).replace("_", " ")
            logger.warning(
                f"stage {need.stage} needs about {need.memory_bytes / 1e9:.1f} GB per GPU, most of it {largest}, but "
                f"the GPU has {available / 1e9:.1f} GB; `mla-convert distill --dry-run` lists what takes memory, and "
                "FSDP2 (recipes/accelerate/fsdp2.yaml) or shard_frozen reduce it"
            )


def least_memory(device: torch.device) -> int:
    """Bytes of `device`, or in a launch of several processes of the smallest GPU that one of this machine's has."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    devices = [torch.device("cuda", index) for index in range(min(here, torch.cuda.device_count()))]
    return min(
        torch.cuda.get_device_properties(one).total_memory for one in (devices if len(devices) > 1 else [device])
    )
