"""Whether a module's weights say all that it does, so that kernels may read them in place of calling it."""

from __future__ import annotations

from torch import nn

from .attention import CausalSelfAttention


def is_plain(module: nn.Module) -> bool:
    """Whether a call does no more than the class says: no hooks of its own, no wrapped forward."""
    return "forward" not in vars(module) and not (module._forward_pre_hooks or module._forward_hooks)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether it is torch's linear layer and nothing around it, such as a LoRA."""
    return type(module) is nn.Linear and is_plain(module)


def changed_module(layer: CausalSelfAttention) -> str | None:
    """The name of what kernels read of `layer` although its weights alone do not say what it does; None for none."""
    for name in ("kv_a_proj", "kv_b_proj", "k_pe_proj"):
        projection = getattr(layer, name, None)
        if projection is not None and not is_plain_linear(projection):
            return name
    return next((name for name in ("norm_q", "norm_k") if not is_plain(getattr(layer, name))), None)
