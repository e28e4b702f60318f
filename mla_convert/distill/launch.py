"""Checks, before anything is loaded, that this launch and machine can run a stage."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env

from ..devices import has_gpu
from ..errors import UserError
from ..registry import stage_of
from .stages.base import Stage, StageConfig
from .trackers import check_trackers


def world_size() -> int:
    """The number of processes in this launch."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def check_launch(config: StageConfig) -> None:
    """Raise UserError, in one line, if the launcher's settings or this machine cannot run a stage."""
    check_trackers(config)
    config.over(world_size())
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not has_gpu()
    if config.mixed_precision == "fp16" and on_cpu:
        raise UserError("mixed_precision: fp16 needs a GPU; use bf16 or no on the CPU")
    if config.compile and config.compile_backend not in torch.compiler.list_backends(exclude_tags=()):
        known = ", ".join(torch.compiler.list_backends())
        raise UserError(f"compile_backend: torch has no {config.compile_backend!r}; choose one of {known}")
    stage: Stage[Any] = stage_of(config)
    what = f"stage {config.stage}"
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError(f"{what}: FSDP1 is not supported; set fsdp_version: 2 (recipes/accelerate/fsdp2.yaml)")
        if not has_gpu():
            raise UserError(f"{what}: FSDP2 needs a GPU, on the CPU Accelerate uses DDP; launch without FSDP")
        if stage.calls_parts:
            raise UserError(f"{what} hooks into the blocks, which FSDP2 does not allow; launch it with DDP")
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        _check_deepspeed(config, stage, what)


def _check_deepspeed(config: StageConfig, stage: Stage[Any], what: str) -> None:
    shipped = "use recipes/accelerate/deepspeed-zero2.yaml"
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"{what}: the package deepspeed is not installed; pip install deepspeed")
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        raise UserError(f"{what}: a DeepSpeed configuration file is not supported; {shipped}")
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") != "2":
        raise UserError(f"{what}: DeepSpeed is supported only with zero_stage 2; {shipped}, or FSDP2 to shard weights")
    for kind in ("OPTIMIZER", "PARAM"):
        if os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{kind}_DEVICE", "none") != "none":
            raise UserError(f"{what}: DeepSpeed's offloading is not supported; set offload_{kind.lower()}_device: none")
    if not has_gpu():
        raise UserError(f"{what}: DeepSpeed needs a GPU, on the CPU Accelerate uses DDP; launch without DeepSpeed")
    if stage.second is not None:
        raise UserError(f"{what} trains two networks, DeepSpeed's engine only one; launch it with DDP or FSDP2")
    if config.optimizer == "adafactor":
        raise UserError(f"{what}: adafactor cannot factor the flat partitions of DeepSpeed; set optimizer: adamw")
    if config.mixed_precision == "fp16":
        raise UserError(f"{what}: under DeepSpeed fp16 losses are not scaled here; set mixed_precision: bf16")
    if config.spike is not None and config.spike.action == "skip":
        raise UserError(f"{what}: DeepSpeed cannot skip a step; set spike.action to warn or stop")
