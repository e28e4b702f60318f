"""LoRA on the linear layers that a stage would leave frozen, by peft: put in, saved, merged into the weights."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..files import atomic_folder, save_tensors
from .keys import LoraConfig

NAME = "distill"
ADAPTER = "adapter"
_WEIGHTS = "adapter_model.safetensors"


def adapted_modules(model: Any, config: LoraConfig, trained: Collection[str], within: str = "blocks") -> list[str]:
    """Names of the linear layers that get an adapter: inside a module called `within`, with no trained parameter.

    Raises UsageError where `target_modules` name none of them.
    """
    frozen = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and within in name.split(".")
        and not any(f"{name}.{parameter}" in trained for parameter, _ in module.named_parameters())
    ]
    if config.target_modules is None:
        wanted = {name: name for name in frozen}
    else:
        wanted = {name: end for name in frozen for end in config.target_modules if f".{name}".endswith(f".{end}")}
        missing = [end for end in config.target_modules if end not in wanted.values()]
        if missing:
            ends = sorted({name.split(".", 2)[-1] for name in frozen})
            raise UsageError(f"lora.target_modules: no frozen linear layer is called {missing[0]}; {', '.join(ends)}")
    if not wanted:
        raise UsageError("lora finds no frozen linear layer; leave it out or train less by trainable")
    return list(wanted)


def add_adapters(model: Any, config: LoraConfig, modules: list[str], generator: torch.Generator) -> set[str]:
    """Put an adapter on each of `modules`, `A` drawn from `generator`; returns the names of their parameters."""
    # Commands without adapters must not wait for peft.
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    settings = PeftConfig(r=config.rank, lora_alpha=config.alpha, target_modules=modules, lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(settings, model, NAME)
    names = {name for name, _ in model.named_parameters() if f".lora_A.{NAME}." in name or f".lora_B.{NAME}." in name}
    for name in sorted(names):
        if f".lora_A.{NAME}." in name:
            weight = model.get_parameter(name)
            # peft draws from the global generator, which a resumed run has in another state.
            bound = 1 / math.sqrt(weight.shape[1])
            drawn = torch.empty(weight.shape).uniform_(-bound, bound, generator=generator)
            weight.data.copy_(drawn)
    return names


def save_adapters(model: Any, folder: Path) -> None:
    """Write the adapters of `model` in peft's format, whole or not at all."""
    from peft import get_peft_model_state_dict

    with atomic_folder(folder) as temporary:
        config = model.peft_config[NAME]
        config.target_modules = sorted(config.target_modules)
        config.save_pretrained(temporary)
        state = get_peft_model_state_dict(model, adapter_name=NAME)
        save_tensors({name: value.detach().cpu().contiguous() for name, value in state.items()}, temporary / _WEIGHTS)


def merge_adapters(model: Any) -> None:
    """Add every adapter to its weight and put the plain linear layer back."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, layer in layers:
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config
