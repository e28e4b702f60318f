"""The converted model: plan every layer, account for every tensor, then build.

Nothing of the dense model is changed; the tensors that both forms have are shared with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError, UserError
from ..families.base import Family
from ..mla.config import MLAConfig
from .calibrate import CalibrationBatch, calibrate
from .config import ConvertConfig
from .initialise import LayerInit, initialise_layer

ATTENTION = "attn1"


@torch.no_grad()
def convert_model(
    family: Family,
    dense: Any,
    config: ConvertConfig,
    batches: Iterable[CalibrationBatch] | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Any:
    """The latent form of `dense`, an instance of `family.dense_class`, in its dtype and on the CPU.

    `batches` are needed for `init: activation`. `progress` is told (what, done, of how many).
    Raises UsageError for ranks and shapes that the model does not have.
    """

    def told(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress(what, done, total)

    layers = len(dense.blocks)
    try:
        ranks = config.ranks(layers)
    except ValueError as error:
        raise UsageError(f"convert.kv_lora_rank: {error}") from None
    _check_rank(dense, config, ranks)
    samples: list[Any] = [None] * layers
    if config.init == "activation":
        if batches is None:
            raise UserError("init: activation needs calibration clips; init: svd converts from the weights alone")
        passes = -(-config.calibration.clips // config.calibration.batch_size)
        samples = calibrate(
            dense,
            batches,
            config.calibration,
            history_only=config.own_chunk == "exact",
            progress=lambda done: told("calibrate", done, passes),
        )
    generator = torch.Generator().manual_seed(seed)
    axes = dense.rotary_table().axes
    planned: list[LayerInit] = []
    for layer, block in enumerate(dense.blocks):
        try:
            planned.append(initialise_layer(block.attn1, samples[layer], axes, config, ranks[layer], generator))
        except ValueError as error:
            raise UsageError(f"convert, layer {layer}: {error}") from None
        samples[layer] = None
        told("convert", layer + 1, layers)
    mla = MLAConfig(
        position=config.position,
        own_chunk=config.own_chunk,
        kv_lora_rank=tuple(ranks),
        q_lora_rank=config.q_lora_rank,
        v_head_dim=dense.config.attention_head_dim,
        rope_pairs=tuple(tuple(plan.rope_pairs) for plan in planned),
        nope_pairs=tuple(tuple(plan.nope_pairs) for plan in planned),
    )
    return _build(family, dense, mla, planned)


def _check_rank(dense: Any, config: ConvertConfig, ranks: list[int]) -> None:
    limit = 2 * dense.config.num_attention_heads * dense.config.attention_head_dim
    for layer, rank in enumerate(ranks):
        if not 1 <= rank <= limit:
            problem = f"{rank} in layer {layer} is not between 1 and {limit}, the width of [k; v]"
            raise UsageError(f"convert.kv_lora_rank: {problem}")


def _build(family: Family, dense: Any, mla: MLAConfig, planned: list[LayerInit]) -> Any:
    settings = {name: value for name, value in dense.config.items() if not name.startswith("_")}
    with torch.device("meta"):
        model = family.mla_class(**settings, mla=mla.model_dump(mode="json"))
    model.rope = dense.rope
    state = merge_state(dense.state_dict(), planned, model.state_dict(), mla.q_lora_rank is not None)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def merge_state(
    source: dict[str, Tensor], planned: list[LayerInit], wanted: dict[str, Tensor], query_factorised: bool
) -> dict[str, Tensor]:
    """State of the converted model; `wanted` gives its names, shapes and dtypes.

    Every source tensor is kept under its name or is the query projection that was factorised.
    Raises RuntimeError when a tensor is neither, or when one is missing or of the wrong shape.
    """
    # The gains of QK-norm are kept by head, a shape that the stock class refuses.
    by_head = {f"blocks.{i}.{ATTENTION}.{norm}.weight" for i in range(len(planned)) for norm in ("norm_q", "norm_k")}
    state = {
        name: tensor.view(wanted[name].shape) if name in by_head else tensor
        for name, tensor in source.items()
        if name in wanted
    }
    dropped = {name for name in source if name not in wanted}
    expected = set()
    if query_factorised:
        expected = {f"blocks.{i}.{ATTENTION}.to_q.{kind}" for i in range(len(planned)) for kind in ("weight", "bias")}
    if dropped != expected:
        raise RuntimeError(f"source tensors neither used, kept nor declared dropped: {sorted(dropped ^ expected)[:4]}")
    for layer, plan in enumerate(planned):
        prefix = f"blocks.{layer}.{ATTENTION}."
        dtype = source[f"{prefix}to_k.weight"].dtype
        state |= {prefix + name: tensor.to(dtype) for name, tensor in plan.tensors.items()}
    wrong = [n for n in wanted if n not in state or state[n].shape != wanted[n].shape]
    if wrong:
        raise RuntimeError(f"converted tensors missing or of the wrong shape: {wrong[:4]}")
    return state
