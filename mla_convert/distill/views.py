"""Networks that a stage has beside the student without loading them: its average, its start, and copies to train."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def with_weights(model: Any, weights: Mapping[str, Tensor]) -> Any:
    """A frozen second model that has `weights` by name, in the same memory, and shares the rest with `model`."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for name, weight in weights.items():
        shared[id(model.get_parameter(name))] = nn.Parameter(weight, requires_grad=False)
    view = copy.deepcopy(model, shared)
    return view.eval()


def require_apart(model: Any, trained: Collection[str], networks: Mapping[str, Any]) -> None:
    """Raise ValueError if parameters of `model` that are `trained` lie in the memory of one of the `networks`.

    A converted model shares what it keeps with the dense one until it is saved or copied; trained in place
    it would take its teacher along. Only float32 is trained in place.
    """
    mine = {
        parameter.data_ptr(): name
        for name, parameter in model.named_parameters()
        if name in trained and parameter.dtype == torch.float32 and not parameter.is_meta
    }
    for network, other in networks.items():
        shared = next((mine[p.data_ptr()] for p in other.parameters() if p.data_ptr() in mine), None)
        if shared is not None:
            raise ValueError(f"the student's {shared} is memory of the network {network} too; train a copy.deepcopy")


def start_of(model: Any, trained: Mapping[str, nn.Parameter]) -> Any:
    """A frozen model that keeps what the `trained` parameters are now; the rest is shared."""
    return with_weights(model, {name: parameter.detach().clone() for name, parameter in trained.items()})


def apart(model: Any) -> Any:
    """A second model over the same memory with parameters of its own: where one is moved, the other stays."""
    own: dict[int, Any] = {id(each): nn.Parameter(each.detach(), each.requires_grad) for each in model.parameters()}
    return copy.deepcopy(model, own)


def face(model: Any) -> Any:
    """A second face of the same weights, buffers and hooks, with plain attributes of its own."""
    # copy.copy would have a sharded module's class build a whole new model.
    view = object.__new__(type(model))
    view.__dict__.update(model.__dict__)
    return view


def trainable_copy(model: nn.Module) -> nn.Module:
    """A float32 copy of a frozen model, to be trained on its own."""
    return copy.deepcopy(model).float().train()
