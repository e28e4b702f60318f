"""Models that do not fit a GPU together: brought there one at a time, or block by block."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import psutil
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.hooks import apply_group_offloading
from torch import Tensor

Offload = Literal["none", "model", "group"]
CPU = torch.device("cpu")


PINNED_SHARE = 0.5
"""Share of the memory that is available which pinned weights may take: nothing else can use it."""


class Weights:
    """Parameters and buffers of a model, which stay on the CPU; the model computes with a copy on `device`.

    Nothing changes them, so a model that leaves the device takes up its tensors on the CPU again, without a copy.
    With `pinned` they lie in pinned memory, which is copied from faster, where the system gives it.
    """

    def __init__(self, model: Any, device: torch.device, pinned: bool) -> None:
        self.device, self.there = device, False
        self.home: list[tuple[Tensor, Tensor]] = []
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if pinned:
                tensor.data = _pinned(tensor.data)
            self.home.append((tensor, tensor.data))

    def bring(self) -> None:
        if not self.there:
            for tensor, kept in self.home:
                tensor.data = kept.to(self.device, non_blocking=True)
            self.there = True

    def leave(self) -> None:
        if self.there:
            for tensor, kept in self.home:
                tensor.data = kept
            self.there = False


class OnDemand(ModelHook):
    """Brings a model to the device when it is called, and has the others of its `group` leave before."""

    def __init__(self, weights: Weights, group: Sequence[Weights]) -> None:
        self.weights, self.group = weights, group

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for other in self.group:
            if other is not self.weights:
                other.leave()
        self.weights.bring()
        return args, kwargs


def place(models: Sequence[Any], vae: Any, device: torch.device, offload: Offload) -> None:
    """Get transformers on the CPU, and a VAE or None, ready to compute on `device`.

    `model` keeps one of them there at a time and takes their weights to be fixed; `group` keeps one block of a
    transformer, which is slower; its copies overlap with computing on CUDA. Caches and activations are on `device`
    in any case.
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


def _fits_pinned(models: Sequence[Any]) -> bool:
    tensors = itertools.chain(*((*model.parameters(), *model.buffers()) for model in models))
    # torch rounds a pinned tensor up to a power of two.
    needed = sum(1 << (tensor.nbytes - 1).bit_length() for tensor in tensors if tensor.nbytes)
    return needed <= PINNED_SHARE * psutil.virtual_memory().available


def _pinned(tensor: Tensor) -> Tensor:
    try:
        return tensor.pin_memory()
    except RuntimeError:
        # The system locks no more pages for this process.
        return tensor
