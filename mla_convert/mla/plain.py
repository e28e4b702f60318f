"""Checks whether a module is fully described by its weights, so that kernels may read them instead of calling it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .attention import CausalSelfAttention


def is_plain(module: nn.Module) -> bool:
    """Whether a call runs only the class's forward: no hooks on the instance, no wrapped forward."""
    return "forward" not in vars(module) and not (module._forward_pre_hooks or module._forward_hooks)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the module is torch's linear layer with nothing around it, such as a LoRA, and numbers for weights.

    A subclass of Tensor, such as torchao's, is quantized or in shards.
    """
    return type(module) is nn.Linear and type(module.weight) in (nn.Parameter, Tensor) and is_plain(module)


def captured_state(model: Any) -> tuple[Any, ...] | None:
    """What a captured pass depends on besides numbers; None if a module has hooks or a wrapped forward.

    That is all modules of `model`, the choices of peft's adapters, and the addresses of weights: one that is replaced,
    as by a larger LoRA, has another. Every pass asks, so this avoids the slow `named_modules` and `parameters`.
    """
    found: list[Any] = []
    left: list[nn.Module] = [model]
    while left:
        module = left.pop()
        if not is_plain(module):
            return None
        found.append(module)
        if module._parameters:
            found += [weight.data_ptr() for weight in module._parameters.values() if weight is not None]
        if "merged_adapters" in vars(module):
            found.append(_adapters(module))
        if module._modules:
            left += [child for child in module._modules.values() if child is not None]
    return tuple(found)


def _adapters(layer: Any) -> tuple[Any, ...]:
    scaling = getattr(layer, "scaling", {})
    return layer.disable_adapters, *map(tuple, (layer.active_adapters, layer.merged_adapters, scaling.items()))


def changed_module(layer: CausalSelfAttention) -> str | None:
    """The first submodule of `layer` that kernels would read but that is not plain; None when all are plain."""
    for name in ("kv_a_proj", "kv_b_proj", "k_pe_proj"):
        projection = getattr(layer, name, None)
        if projection is not None and not is_plain_linear(projection):
            return name
    return next((name for name in ("norm_q", "norm_k") if not is_plain(getattr(layer, name))), None)
