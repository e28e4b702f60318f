"""Offloads models that do not fit on a GPU together: moves them there one at a time, or block by block."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import psutil
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

Offload = Literal["none", "model", "group"]
CPU = torch.device("cpu")

logger = logging.getLogger(__name__)

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
        for tensor in _tensors(model):
            if pinned:
                _pin(tensor)
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
    of a transformer there, which is slower; on CUDA its copies overlap with computation where memory can be pinned.
    Caches and activations are on `device` in any case.
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
    if offload == "group":
        _place_by_block(models, device)


def _place_by_block(models: Sequence[Any], device: torch.device) -> None:
    """Offload `models` block by block. Copies overlap with computation where all blocks, or one at a time, are pinned.

    diffusers pins whatever is not pinned yet, without asking whether it fits, and fails where the system refuses.
    """
    streamed = device.type == "cuda"
    all_fit = streamed and _fits_pinned(models)
    if streamed and not (_pin_all(models) if all_fit else _can_pin_a_block(models)):
        streamed = False
        logger.warning(
            "the system does not let this process pin memory, so copies of weights do not overlap with computation "
            "and every pass is slower"
        )
    for model in models:
        apply_group_offloading(
            model,
            onload_device=device,
            offload_device=CPU,
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=streamed,
            low_cpu_mem_usage=not all_fit,
        )


def _pin_all(models: Sequence[Any]) -> bool:
    """Move all weights to pinned memory; returns False at the first that the system refuses."""
    return all(_pin(tensor) for model in models for tensor in _tensors(model))


def _can_pin_a_block(models: Sequence[Any]) -> bool:
    """Whether the system lets this process pin the largest block, as diffusers will do for every pass."""
    blocks = [block for model in models for block in model.blocks]
    largest = max(blocks, key=lambda block: sum(tensor.nbytes for tensor in _tensors(block)))
    pinned = [_pinned(tensor.data) for tensor in _tensors(largest)]
    return all(tensor is not None for tensor in pinned)


def _tensors(model: Any) -> Iterator[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())


def _fits_pinned(models: Sequence[Any]) -> bool:
    # torch rounds a pinned tensor up to a power of two.
    sizes = (tensor.nbytes for model in models for tensor in _tensors(model))
    needed = sum(1 << (size - 1).bit_length() for size in sizes if size)
    return needed <= PINNED_SHARE * psutil.virtual_memory().available


def _pin(tensor: Tensor) -> bool:
    """Move a tensor's data to pinned memory; returns False, and leaves them, if the system refuses."""
    pinned = _pinned(tensor.data)
    if pinned is None:
        return False
    tensor.data = pinned
    return True


def _pinned(tensor: Tensor) -> Tensor | None:
    try:
        return tensor.pin_memory()
    except RuntimeError:
        # The system cannot lock more pages for this process.
        return None
