"""What a launch cannot do for a stage, said before anything is loaded."""

from __future__ import annotations

import os

import torch
from accelerate.utils import parse_flag_from_env

from ..errors import UserError
from ..registry import stages
from .stages.base import StageConfig
from .trackers import check_trackers


def check_launch(config: StageConfig) -> None:
    """Refuse what this launcher's settings and this machine cannot do for a stage. Raises UserError in one line."""
    check_trackers(config)
    if config.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise UserError("mixed_precision: fp16 needs a GPU; use bf16 or no on the CPU")
    stage = stages()[config.stage](config)
    what = f"stage {config.stage}"
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError(f"{what}: FSDP1 is not supported; set fsdp_version: 2 (recipes/accelerate/fsdp2.yaml)")
        if not torch.accelerator.is_available():
            raise UserError(f"{what}: FSDP2 needs GPUs here, Accelerate trains with DDP on a CPU; launch without it")
        if stage.second is not None:
            raise UserError(f"{what} trains two networks and FSDP2 shards one; launch it with DDP")
        if stage.calls_parts:
            raise UserError(f"{what} looks into the blocks, which FSDP2 does not allow; launch it with DDP")
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(f"{what}: DeepSpeed is not supported; use recipes/accelerate/fsdp2.yaml")
