"""Models that do not fit a GPU together: brought there one at a time, or block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.hooks import apply_group_offloading

Offload = Literal["none", "model", "group"]
CPU = torch.device("cpu")


class OnDemand(ModelHook):
    """Brings a model to `device` when it is called, and sends the others of its `group` back before."""

    def __init__(self, group: Sequence[Any], device: torch.device) -> None:
        self.group, self.device = group, device

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for other in self.group:
            if other is not module:
                other.to(CPU)
        module.to(self.device)
        return args, kwargs


def place(models: Sequence[Any], vae: Any, device: torch.device, offload: Offload) -> None:
    """Get transformers on the CPU, and a VAE or None, ready to compute on `device`.

    `model` keeps one of them there at a time, `group` one block of a transformer, which is slower; its
    copies overlap with computing on CUDA. Caches and activations are on `device` in any case.
    """
    everyone = [*models, *([] if vae is None else [vae])]
    if offload == "model":
        for one in everyone:
            add_hook_to_module(one, OnDemand(everyone, device))
        return
    for one in everyone if offload == "none" else everyone[len(models) :]:
        one.to(device)
    for model in models if offload == "group" else ():
        apply_group_offloading(
            model,
            onload_device=device,
            offload_device=CPU,
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=device.type == "cuda",
        )
