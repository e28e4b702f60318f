"""Makes the networks that a stage derives from loaded ones: the student's average and start, and copies to train."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def with_weights(model: Any, weights: Mapping[str, Tensor]) -> Any:
    """A frozen model that uses `weights` by name, in their own memory, and shares everything else with `model`."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for name, weight in weights.items():
        shared[id(model.get_parameter(name))] = nn.Parameter(weight, requires_grad=False)
    view = copy.deepcopy(model, shared)
    return view.eval()


def require_apart(model: Any, trained: Collection[str], networks: Mapping[str, Any]) -> None:
    """Raise ValueError if `trained` parameters of `model` share memory with one of the `networks`.

    A converted model shares its unchanged weights with the dense one until it is saved or copied. Training it in place
    would change its teacher, too. Only float32 parameters are trained in place.
    """
    mine = {
        parameter.data_ptr(): name
        for name, parameter in model.named_parameters()
        if name in trained and parameter.dtype == torch.float32 and not parameter.is_meta
    }
    for network, other in networks.items():
        shared = next((mine[p.data_ptr()] for p in other.parameters() if p.data_ptr() in mine), None)
        if shared is not None:
            raise ValueError(f"the student's {shared} shares memory with the network {network}; train a copy.deepcopy")


def start_of(model: Any, trained: Mapping[str, nn.Parameter]) -> Any:
    """A frozen model with a copy of the `trained` parameters as they are now; it shares the rest with `model`."""
    return with_weights(model, {name: parameter.detach().clone() for name, parameter in trained.items()})


def apart(model: Any) -> Any:
    """A second model with its own Parameter objects over the same memory, so that moving one leaves the other."""
    own: dict[int, Any] = {id(each): nn.Parameter(each.detach(), each.requires_grad) for each in model.parameters()}
    return copy.deepcopy(model, own)


def face(model: Any) -> Any:
    """A shallow copy: the same weights, buffers and hooks, with its own plain attributes."""
    # For a sharded module, copy.copy would construct a whole new model.
    view = object.__new__(type(model))
    view.__dict__.update(model.__dict__)
    return view


def trainable_copy(model: nn.Module) -> nn.Module:
    """A float32 copy of a frozen model, to be trained on its own."""
    return copy.deepcopy(model).float().train()
