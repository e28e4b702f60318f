"""Selects the parameters that a stage trains."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from ..errors import UsageError
from ..mla.latent import LATENT_MODULES

Trainable = Literal["latent", "attention", "all"]


def trainable_names(model: Any, which: Trainable) -> set[str]:
    """The names of the parameters that `which` selects. Raises UsageError if there are none."""

    def chosen(name: str) -> bool:
        parts = name.split(".")
        if which == "latent":
            return any(part in LATENT_MODULES for part in parts)
        return which == "all" or "attn1" in parts

    names = {name for name, _ in model.named_parameters() if chosen(name)}
    if not names:
        raise UsageError(
            f"trainable: {which} finds no parameters in {type(model).__name__}; choose latent, attention or all"
        )
    return names


def freeze_all_but(model: nn.Module, names: set[str]) -> dict[str, nn.Parameter]:
    """Set `requires_grad` only on the parameters `names`; return them by name, in the model's order."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return {name: parameter for name, parameter in model.named_parameters() if name in names}
