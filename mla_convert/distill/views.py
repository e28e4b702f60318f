"""Networks that a stage has beside the student without loading them: its average, its start, and copies to train."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def with_weights(model: Any, weights: Mapping[str, Tensor]) -> Any:
    """A frozen second model that has `weights` by name, in the same memory, and shares the rest with `model`."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for name, weight in weights.items():
        shared[id(model.get_parameter(name))] = nn.Parameter(weight, requires_grad=False)
    view = copy.deepcopy(model, shared)
    return view.eval()


def start_of(model: Any, trained: Mapping[str, nn.Parameter]) -> Any:
    """A frozen model that keeps what the `trained` parameters are now; the rest is shared."""
    return with_weights(model, {name: parameter.detach().clone() for name, parameter in trained.items()})


def trainable_copy(model: nn.Module) -> nn.Module:
    """A float32 copy of a frozen model, to be trained on its own."""
    return copy.deepcopy(model).float().train()
