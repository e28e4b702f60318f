"""Convert a model in memory: fit every layer, account for every tensor, then build the converted model.

The dense model is not changed. The converted model shares the tensors that both forms have.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..families.base import Family
from ..families.causal import CausalTransformer, LatentTransformer
from ..mla.config import MLAConfig
from .blocks import ModelBlocks
from .clips import CalibrationBatch
from .config import ConvertConfig
from .layers import Plans, Progress, convert_layers, final_ranks
from .state import merge_state, mla_config


@torch.no_grad()
def convert_model(
    family: Family,
    dense: CausalTransformer,
    config: ConvertConfig,
    batches: Iterable[CalibrationBatch] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> LatentTransformer:
    """The latent form of `dense`, an instance of `family.dense_class`, in its dtype and on its device.

    `init: activation` needs `batches`. `progress` is called with (phase, done, total).
    Raises UsageError for ranks and shapes that the model cannot have.
    """
    blocks, plans = ModelBlocks(dense), Plans()
    convert_layers(blocks, config, batches, seed, plans, progress)
    planned = [plans.get(layer) for layer in range(len(blocks))]
    ranks = final_ranks(blocks, config, planned)
    planned = [plan.truncated(rank) for plan, rank in zip(planned, ranks, strict=True)]
    mla = mla_config(config, ranks, planned, dense.config.attention_head_dim)
    model = empty_model(family, dense, mla)
    state = merge_state(dense.state_dict(), planned, model.state_dict())
    model.load_state_dict(state, strict=True, assign=True)
    copy_unsaved_buffers(dense, model)
    # Moves the index buffers that only the converted model has.
    return model.to(dense.device).eval().requires_grad_(False)


def empty_model(family: Family, dense: CausalTransformer, mla: MLAConfig) -> LatentTransformer:
    """Build the converted form of `dense` on the meta device."""
    settings = {name: value for name, value in dense.config.items() if not name.startswith("_")}
    with torch.device("meta"):
        return family.mla_class(**settings, mla=mla.model_dump(mode="json"))


def copy_unsaved_buffers(dense: nn.Module, model: nn.Module) -> None:
    """Copy to `model` the buffers of `dense` that no state dict holds, such as rotary tables."""
    saved = dense.state_dict().keys()
    for name, buffer in dense.named_buffers():
        if name not in saved:
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, buffer)
