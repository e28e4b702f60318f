"""Checks whether a module is fully described by its weights, so that kernels may read them instead of calling it."""

from __future__ import annotations

from collections.abc import Iterable
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


def built_in(modules: Iterable[nn.Module]) -> tuple[Any, ...]:
    """What a captured pass depends on besides numbers: modules, choices of peft's adapters, and where weights are."""
    return tuple((module, _adapters(module), _places(module)) for module in modules)


def _places(module: nn.Module) -> tuple[int, ...]:
    """The addresses of a module's own weights: one that is replaced, as by a larger LoRA, has another."""
    return tuple(weight.data_ptr() for weight in module.parameters(recurse=False))


def _adapters(module: nn.Module) -> tuple[Any, ...]:
    if "merged_adapters" not in vars(module):
        return ()
    layer: Any = module
    scaling = getattr(layer, "scaling", {})
    return layer.disable_adapters, *map(tuple, (layer.active_adapters, layer.merged_adapters, scaling.items()))


def changed_module(layer: CausalSelfAttention) -> str | None:
    """The first submodule of `layer` that kernels would read but that is not plain; None when all are plain."""
    for name in ("kv_a_proj", "kv_b_proj", "k_pe_proj"):
        projection = getattr(layer, name, None)
        if projection is not None and not is_plain_linear(projection):
            return name
    return next((name for name in ("norm_q", "norm_k") if not is_plain(getattr(layer, name))), None)
