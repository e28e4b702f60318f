"""Whether the stages of a run fit the card they begin on, said before hours of work."""

from __future__ import annotations

import logging

import torch
from accelerate.utils import parse_flag_from_env

from ..distill.footprint import Launch
from ..distill.launch import world_size
from ..errors import UserError
from ..recipe.schema import Recipe
from .dry_run import DryRun

ROOM = 0.95
"""The share of a card that may be counted on; fragmentation and libraries take the rest."""

logger = logging.getLogger(__name__)


def warn_of_memory(recipe: Recipe, device: torch.device) -> None:
    """Log a line for every stage that counts more memory than a card like `device` has, as `--dry-run` counts it.

    What is counted is no measurement, so nothing is refused.
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
    there = torch.cuda.get_device_properties(device).total_memory
    for need in needs:
        if need.memory_bytes > ROOM * there:
            largest = max(need.memory, key=need.memory.__getitem__).replace("_", " ")
            logger.warning(
                f"stage {need.stage} is counted at {need.memory_bytes / 1e9:.1f} GB a GPU, most of it {largest}, and "
                f"the card has {there / 1e9:.1f} GB; `mla-convert distill --dry-run` lists it, FSDP2 "
                "(recipes/accelerate/fsdp2.yaml) and shard_frozen cut it"
            )
