"""Checkpoints of the published models' shapes with random weights, in the layout that diffusers saves, and cuts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

WEIGHTS = "diffusion_pytorch_model{suffix}.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
_SMALL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_LARGE = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
SHAPES: dict[str, dict[str, Any]] = {
    "1.3b": _SMALL,
    "14b": _LARGE,
    "anyflow-far-1.3b": _SMALL,
    "anyflow-far-14b": _LARGE,
    "skyreels-v2-1.3b": {**_SMALL, "inject_sample_info": True},
    "skyreels-v2-14b": _LARGE,
}


def stock_class(shape: str) -> Any:
    """The class of diffusers that a key of SHAPES belongs to."""
    if shape.startswith("anyflow"):
        return diffusers.AnyFlowFARTransformer3DModel
    return diffusers.SkyReelsV2Transformer3DModel if shape.startswith("skyreels") else diffusers.WanTransformer3DModel


def write_checkpoint(
    folder: Path, shape: str, layers: int | None = None, shard_size: str = "300MB", seed: int = 0, **changes: Any
) -> int:
    """Write a stock checkpoint in bfloat16, one shard in memory at a time; returns its parameters.

    `shape` is a key of SHAPES, `layers` the number of blocks if not all, `changes` other keys of the
    configuration. Weights and biases have a standard deviation of 0.02, gains are 1.
    """
    settings = {**SHAPES[shape], **({} if layers is None else {"num_layers": layers}), **changes}
    with torch.device("meta"):
        model = stock_class(shape)(**settings)
    model.save_config(folder)
    state = _in_bfloat16(model)
    split = split_torch_state_dict_into_shards(state, max_shard_size=shard_size, filename_pattern=WEIGHTS)
    generator = torch.Generator().manual_seed(seed)
    for filename, names in split.filename_to_tensors.items():
        shard = {name: _drawn(name, state[name].shape, generator) for name in names}
        save_file(shard, folder / filename, {"format": "pt"})
    # A single file is listed too: a cut needs the names.
    _write_index(folder, split.tensor_to_filename, sum(map(_bytes, state.values())))
    return sum(math.prod(tensor.shape) for tensor in state.values())


def cut_checkpoint(source: Path, folder: Path, layers: int) -> int:
    """The first `layers` blocks of a checkpoint, whose shards are linked to; returns the parameters."""
    folder.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "num_layers": layers}), encoding="utf-8")
    named: dict[str, str] = json.loads((source / INDEX).read_text(encoding="utf-8"))["weight_map"]
    kept = {
        name: file for name, file in named.items() if not name.startswith("blocks.") or int(name.split(".")[1]) < layers
    }
    for file in sorted(set(kept.values())):
        (folder / file).symlink_to(source / file)
    with torch.device("meta"):
        model = getattr(diffusers, config["_class_name"]).from_config({**config, "num_layers": layers})
    state = _in_bfloat16(model)
    _write_index(folder, kept, sum(map(_bytes, state.values())))
    return sum(math.prod(tensor.shape) for tensor in state.values())


def _in_bfloat16(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}


def _drawn(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    drawn = torch.randn(shape, generator=generator).mul_(0.02)
    gain = "norm" in name.rpartition(".")[0].rpartition(".")[2] and name.endswith("weight")
    return (drawn.zero_().add_(1) if gain else drawn).to(torch.bfloat16)


def _write_index(folder: Path, weight_map: dict[str, str], size: int) -> None:
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
