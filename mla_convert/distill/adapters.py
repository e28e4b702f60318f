"""Adds LoRA adapters (peft) to linear layers that a stage leaves frozen, saves them, and merges them."""

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
    """The names of the linear layers that get an adapter: inside a module called `within`, without trained parameters.

    Raises UsageError if an entry of `target_modules` matches none, or if there are none.
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
            choices = ", ".join(ends)
            raise UsageError(
                f"lora.target_modules: no frozen linear layer is called {missing[0]}; choose from {choices}"
            )
    if not wanted:
        raise UsageError("lora finds no frozen linear layer; leave it out, or set trainable to a smaller part")
    return list(wanted)


def add_adapters(model: Any, config: LoraConfig, modules: list[str], generator: torch.Generator) -> set[str]:
    """Add an adapter to each of `modules`, with `A` drawn from `generator`; return the names of their parameters."""
    # Imported here so that commands without adapters do not wait for peft.
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    settings = PeftConfig(r=config.rank, lora_alpha=config.alpha, target_modules=modules, lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(settings, model, NAME)
    names = {name for name, _ in model.named_parameters() if f".lora_A.{NAME}." in name or f".lora_B.{NAME}." in name}
    for name in sorted(names):
        if f".lora_A.{NAME}." in name:
            weight = model.get_parameter(name)
            # peft draws from the global generator, whose state differs in a resumed run.
            bound = 1 / math.sqrt(weight.shape[1])
            drawn = torch.empty(weight.shape).uniform_(-bound, bound, generator=generator)
            weight.data.copy_(drawn)
    return names


def save_adapters(model: Any, folder: Path) -> None:
    """Write the adapters of `model` in peft's format, atomically."""
    from peft import get_peft_model_state_dict

    with atomic_folder(folder) as temporary:
        config = model.peft_config[NAME]
        config.target_modules = sorted(config.target_modules)
        config.save_pretrained(temporary)
        state = get_peft_model_state_dict(model, adapter_name=NAME)
        save_tensors({name: value.detach().cpu().contiguous() for name, value in state.items()}, temporary / _WEIGHTS)


def merge_adapters(model: Any) -> None:
    """Add every adapter to its weight and restore the plain linear layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, layer in layers:
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config
