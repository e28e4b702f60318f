"""Warns before anything is loaded if training, samples or a model's dtype may need more memory than the GPU has."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env

from ..devices import lacks_bfloat16, processes_here
from ..distill.footprint import Launch
from ..distill.launch import world_size
from ..errors import UserError
from ..evaluate.geometry import from_model
from ..evaluate.memory import activation_bytes
from ..export.checkpoint import load_shape
from ..recipe.schema import Recipe
from ..run.latents import latent_size
from .context import Context
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


def warn_of_samples(context: Context) -> None:
    """Log a warning if the teacher's samples need more memory than the GPU has, even with its weights on the CPU.

    All prompts are sampled together. Counted are the caches, the working memory of eager attention and two blocks.
    """
    generate, source = context.generate, context.source
    if context.device.type != "cuda" or not generate.prompts:
        return
    with torch.device("meta"):
        teacher = source.family.dense_class.from_config(source.config)
    height, width = latent_size(source.config, generate)
    streams = len(generate.prompts) * (1 if generate.guidance_scale == 1 else 2)
    geometry, _ = from_model(teacher, height, width)
    item = context.dtype.itemsize
    block = max(sum(parameter.numel() for parameter in block.parameters()) for block in teacher.blocks)
    caches = teacher.init_cache(streams, height, width, dtype=context.dtype, device="meta").bytes()
    needed = caches + streams * activation_bytes(geometry, geometry.window_frames, item) + 2 * block * item
    available = torch.cuda.get_device_properties(context.device).total_memory
    if needed > ROOM * available:
        logger.warning(
            f"sampling the {len(generate.prompts)} prompts of the recipe needs about {needed / 1e9:.1f} GB, "
            f"{caches / 1e9:.1f} GB of it for the teacher's cache, but the GPU has {available / 1e9:.1f} GB; give "
            "fewer generate.prompts, generate.guidance_scale 1 or a smaller generate.latent_height and latent_width, "
            "or leave the prompts out and use `generate --offload`"
        )


def warn_of_bfloat16(root: Path, dtype: str | None, device: torch.device) -> None:
    """Log a warning if the checkpoint in `root` would stream in bfloat16 on an older GPU.

    `dtype` None is the stored one. No other dtype is taken unasked: float16 ends at 65,504, which weights trained in
    bfloat16 may exceed.
    """
    if lacks_bfloat16(device) and dtype in (None, "bfloat16"):
        if dtype is None and load_shape(root).dtype != torch.bfloat16:
            return
        logger.warning(
            "%s has no fused attention in bfloat16, so torch computes all logits, gigabytes of them; --dtype float16 "
            "avoids that",
            torch.cuda.get_device_name(device),
        )


def least_memory(device: torch.device) -> int:
    """Bytes of `device`, or in a launch of several processes of the smallest GPU that one of this machine's has."""
    devices = [torch.device("cuda", index) for index in range(min(processes_here(), torch.cuda.device_count()))]
    return min(
        torch.cuda.get_device_properties(one).total_memory for one in (devices if len(devices) > 1 else [device])
    )
