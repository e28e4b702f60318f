"""Offloads models that do not fit on a GPU together: moves them there one at a time, or block by block."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import psutil
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

Offload = Literal["none", "model", "group"]
CPU = torch.device("cpu")


PINNED_SHARE = 0.5
"""Share of the available memory that pinned weights may take, because nothing else can use that memory."""


class Weights:
    """Parameters and buffers of a model that stay on the CPU, while the model computes with a copy on `device`.

    Nothing changes the weights, so a model that leaves the device reuses its CPU tensors without a copy. With `pinned`,
    these are in pinned memory, which copies faster, if the system grants it.
    """

    def __init__(self, model: nn.Module, device: torch.device, pinned: bool) -> None:
        self.device, self.on_device = device, False
        self.home: list[tuple[Tensor, Tensor]] = []
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if pinned:
                tensor.data = _pinned(tensor.data)
            self.home.append((tensor, tensor.data))

    def bring(self) -> None:
        if not self.on_device:
            for tensor, kept in self.home:
                tensor.data = kept.to(self.device, non_blocking=True)
            self.on_device = True

    def leave(self) -> None:
        if self.on_device:
            for tensor, kept in self.home:
                tensor.data = kept
            self.on_device = False


class OnDemand(ModelHook):
    """Moves a model to the device when it is called, after moving the others of its `group` away."""

    def __init__(self, weights: Weights, group: Sequence[Weights]) -> None:
        self.weights, self.group = weights, group

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for other in self.group:
            if other is not self.weights:
                other.leave()
        self.weights.bring()
        return args, kwargs


def place(models: Sequence[nn.Module], vae: Any, device: torch.device, offload: Offload) -> None:
    """Prepare transformers that are on the CPU, and a VAE if any, to compute on `device`.

    `model` keeps one model on the device at a time and assumes that its weights do not change. `group` keeps one block
    of a transformer there, which is slower; on CUDA its copies overlap with computation. Caches and activations are on
    `device` in any case.
    """
    everyone = [*models, *([] if vae is None else [vae])]
    if offload == "model":
        pinned = device.type == "cuda" and _fits_pinned(everyone)
        group = [Weights(one, device, pinned) for one in everyone]
        for one, weights in zip(everyone, group, strict=True):
            add_hook_to_module(one, OnDemand(weights, group))
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


def _fits_pinned(models: Sequence[nn.Module]) -> bool:
    tensors = itertools.chain(*((*model.parameters(), *model.buffers()) for model in models))
    # torch rounds a pinned tensor up to a power of two.
    needed = sum(1 << (tensor.nbytes - 1).bit_length() for tensor in tensors if tensor.nbytes)
    return needed <= PINNED_SHARE * psutil.virtual_memory().available


def _pinned(tensor: Tensor) -> Tensor:
    try:
        return tensor.pin_memory()
    except RuntimeError:
        # The system cannot lock more pages for this process.
        return tensor
