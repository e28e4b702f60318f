"""What a launch cannot do for a stage, said before anything is loaded."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env

from ..errors import UserError
from ..registry import stages
from .stages.base import Stage, StageConfig
from .trackers import check_trackers


def world_size() -> int:
    """The processes of this launch."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def check_launch(config: StageConfig) -> None:
    """Refuse what this launcher's settings and this machine cannot do for a stage. Raises UserError in one line."""
    check_trackers(config)
    config.over(world_size())
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if config.mixed_precision == "fp16" and on_cpu:
        raise UserError("mixed_precision: fp16 needs a GPU; use bf16 or no on the CPU")
    if config.compile and config.compile_backend not in torch.compiler.list_backends(exclude_tags=()):
        known = ", ".join(torch.compiler.list_backends())
        raise UserError(f"compile_backend: torch has no {config.compile_backend!r}; choose one of {known}")
    stage = stages()[config.stage](config)
    what = f"stage {config.stage}"
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError(f"{what}: FSDP1 is not supported; set fsdp_version: 2 (recipes/accelerate/fsdp2.yaml)")
        if not torch.accelerator.is_available():
            raise UserError(f"{what}: FSDP2 needs GPUs here, Accelerate trains with DDP on a CPU; launch without it")
        if stage.calls_parts:
            raise UserError(f"{what} looks into the blocks, which FSDP2 does not allow; launch it with DDP")
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        _check_deepspeed(config, stage, what)


def _check_deepspeed(config: StageConfig, stage: Stage[Any], what: str) -> None:
    shipped = "use recipes/accelerate/deepspeed-zero2.yaml"
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"{what}: the package deepspeed is not installed: pip install deepspeed")
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        raise UserError(f"{what}: a configuration file of DeepSpeed's own is not read; {shipped}")
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") != "2":
        raise UserError(
            f"{what}: of DeepSpeed only zero_stage 2 is supported; {shipped}, or FSDP2 to shard weights too"
        )
    for kind in ("OPTIMIZER", "PARAM"):
        if os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{kind}_DEVICE", "none") != "none":
            raise UserError(f"{what}: DeepSpeed's offloading is not supported; set offload_{kind.lower()}_device: none")
    if not torch.accelerator.is_available():
        raise UserError(f"{what}: DeepSpeed needs GPUs here, Accelerate trains with DDP on a CPU; launch without it")
    if stage.second is not None:
        raise UserError(f"{what} trains two networks and DeepSpeed has one engine; launch it with DDP or FSDP2")
    if config.optimizer == "adafactor":
        raise UserError(f"{what}: DeepSpeed cuts weights into flat parts, which adafactor cannot factor; set adamw")
    if config.mixed_precision == "fp16":
        raise UserError(f"{what}: weights are float32 under DeepSpeed and fp16 losses are not scaled; set bf16")
    if config.spike is not None and config.spike.action == "skip":
        raise UserError(f"{what}: DeepSpeed does not leave out a step; set spike.action to warn or stop")
