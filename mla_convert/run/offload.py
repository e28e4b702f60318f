"""Offloads models that do not fit on a GPU together: moves them there one at a time, or block by block."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import psutil
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

from ..devices import processes_here
from ..mla.kernels import free_memory

Offload = Literal["none", "model", "group"]
CPU = torch.device("cpu")

logger = logging.getLogger(__name__)

PINNED_SHARE = 0.5
"""Share of the available memory that the pinned weights of all processes on a machine may take.

Nothing else can use that memory.
"""

WEIGHTS_SHARE = 0.75
"""Share of a GPU's free memory that weights may take to stay there; activations and caches need the rest."""


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
            self.on_device = True
            try:
                for tensor, kept in self.home:
                    tensor.data = kept.to(self.device, non_blocking=True)
            except BaseException:
                # Half a model is of no use, and takes the memory that was not enough.
                self.leave()
                raise

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


def traveling(models: Sequence[Any], device: torch.device) -> int:
    """How many of `models`, the last ones, cannot stay on `device` with the others while they compute there."""
    free, count = free_memory(device), len(models)
    while free is not None and count and sum(_size(model) for model in models[:count]) > WEIGHTS_SHARE * free:
        count -= 1
    return len(models) - count


@contextlib.contextmanager
def together(models: Sequence[Any], device: torch.device) -> Iterator[None]:
    """Inside the context, transformers from the CPU compute on `device` in any order; afterwards they are back.

    Where their weights do not fit together, the last of them, or all, keep only the layers of one latent there at a
    time, those of the largest latent of any model, so every pass reads their weights over the bus. A layer that is not
    called through its block needs `devices.bring_weights(block)` first.
    """
    there = len(models) - traveling(models, device)
    if there < len(models):
        logger.info(
            "%d of %d models are copied to %s layer by layer, which is slower: their weights do not fit together",
            len(models) - there,
            len(models),
            device,
        )
    latents = max((model.latent_groups for model in models), key=lambda latents: max(map(len, latents)))
    with contextlib.ExitStack() as placed:
        for index, model in enumerate(models):
            placed.callback(model.to, CPU)
            if index < there:
                model.to(device)
            else:
                placed.enter_context(_by_layer(model, latents, device))
        yield


@contextlib.contextmanager
def _by_layer(model: Any, latents: Sequence[range], device: torch.device) -> Iterator[None]:
    """Inside the context, the blocks of one of `latents` are on `device` at a time, and all else of a model is there.

    Afterwards, also after lack of memory halfway, the blocks are on the CPU without hooks.
    """
    pinned = device.type == "cuda" and _fits_pinned([model])
    blocks = [nn.ModuleList(model.blocks[layer] for layer in layers) for layers in latents]
    groups = [Weights(part, device, pinned) for part in blocks]
    try:
        for weights, layers in zip(groups, latents, strict=True):
            for layer in layers:
                add_hook_to_module(model.blocks[layer], OnDemand(weights, groups))
        for name, child in model.named_children():
            if name != "blocks":
                child.to(device)
        for tensor in (*model.parameters(recurse=False), *model.buffers(recurse=False)):
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for weights in groups:
            weights.leave()
        for block in model.blocks:
            remove_hook_from_module(block)
            # What Accelerate leaves here looks like a forward that is still wrapped.
            vars(block).pop("forward", None)


def _size(model: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(model))


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
    largest = max(blocks, key=_size)
    pinned = [_pinned(tensor.data) for tensor in _tensors(largest)]
    return all(tensor is not None for tensor in pinned)


def _tensors(model: Any) -> Iterator[Tensor]:
    return itertools.chain(model.parameters(), model.buffers())


def _fits_pinned(models: Sequence[Any]) -> bool:
    # torch rounds a pinned tensor up to a power of two.
    sizes = (tensor.nbytes for model in models for tensor in _tensors(model))
    needed = sum(1 << (size - 1).bit_length() for size in sizes if size)
    return needed <= PINNED_SHARE * psutil.virtual_memory().available / processes_here()


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
