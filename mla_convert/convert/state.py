"""Map the state of the dense model to that of the converted one, and account for every source tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..families.base import Shapes
from ..mla.attention import DenseSelfAttention
from ..mla.config import MLAConfig
from ..mla.latent import LatentSelfAttention
from .config import ConvertConfig
from .initialize import LayerInit

ATTENTION = "attn1"
_BY_HEAD = ("norm_q.weight", "norm_k.weight")
_QUERY = ("to_q.weight", "to_q.bias")


def mla_config(config: ConvertConfig, ranks: Sequence[int], plans: Iterable[LayerInit], head_dim: int) -> MLAConfig:
    """The `mla` section of a model whose layers were fitted as `plans`."""
    planned = list(plans)
    return MLAConfig(
        position=config.position,
        own_chunk=config.own_chunk,
        kv_lora_rank=tuple(ranks),
        q_lora_rank=config.q_lora_rank,
        v_head_dim=head_dim,
        rope_pairs=tuple(tuple(plan.rope_pairs) for plan in planned),
        nope_pairs=tuple(tuple(plan.nope_pairs) for plan in planned),
        key_mean=config.keeps_key_mean,
        layers_per_latent=config.layers_per_latent,
    )


def attention_state(source: Mapping[str, Tensor], plan: LayerInit, heads: int) -> dict[str, Tensor]:
    """Build the state of a latent self-attention from that of the dense one, in its dtype and on its device.

    Kept tensors are shared, not copied.
    """
    like = source["to_k.weight"]
    kept = {name: tensor for name, tensor in source.items() if name not in _dropped(plan)}
    # The gains of QK-norm are stored per head, a shape that the stock class refuses to load.
    kept |= {name: kept[name].view(heads, -1) for name in _BY_HEAD}
    return kept | {name: tensor.to(like) for name, tensor in plan.tensors.items()}


def _dropped(plan: LayerInit) -> tuple[str, ...]:
    """The tensors of a dense self-attention that a factorized query replaces."""
    return _QUERY if "q_a_proj.weight" in plan.tensors else ()


def block_state(source: Mapping[str, Tensor], plan: LayerInit, heads: int) -> dict[str, Tensor]:
    """Build the state of a converted block from that of the dense one."""
    prefix = f"{ATTENTION}."
    dense = {name.removeprefix(prefix): tensor for name, tensor in source.items() if name.startswith(prefix)}
    rest = {name: tensor for name, tensor in source.items() if not name.startswith(prefix)}
    latent = attention_state(dense, plan, heads)
    return rest | {prefix + name: tensor for name, tensor in latent.items()}


def latent_attention(
    dense: DenseSelfAttention, plan: LayerInit, config: ConvertConfig, rank: int
) -> LatentSelfAttention:
    """Convert one layer, for passes without a cache; the dense layer is not changed.

    A layer that shares its latent needs the `latents` of a pass.
    """
    mla = mla_config(config.model_copy(update={"layers_per_latent": 1}), [rank], [plan], dense.head_dim)
    eps = dense.norm_k.eps
    assert eps is not None
    with torch.device("meta"):
        attention = LatentSelfAttention(dense.to_k.in_features, dense.heads, dense.head_dim, eps, 0, mla)
    state = attention_state(dense.state_dict(), plan, dense.heads)
    attention.load_state_dict(state, assign=True)
    return attention.to(dense.to_k.weight.device).eval().requires_grad_(False)


def merge_state(
    source: Mapping[str, Tensor], planned: Sequence[LayerInit], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Build the state of the converted model; `wanted` gives its names and shapes.

    Every source tensor must be kept under its name or belong to a query projection that was factorized. Raises
    RuntimeError if one is neither, or if a converted tensor is missing or has the wrong shape.
    """
    state = dict(source)
    for layer, plan in enumerate(planned):
        prefix = f"blocks.{layer}."
        names = [name for name in source if name.startswith(prefix)]
        block = {name.removeprefix(prefix): state.pop(name) for name in names}
        heads = wanted[f"{prefix}{ATTENTION}.norm_k.weight"].shape[0]
        converted = block_state(block, plan, heads)
        state |= {prefix + name: tensor for name, tensor in converted.items()}
    check_account(
        source,
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        {name: tuple(tensor.shape) for name, tensor in wanted.items()},
        sum(bool(_dropped(plan)) for plan in planned),
    )
    return state


def check_account(source: Collection[str], state: Shapes, wanted: Shapes, layers_with_factorized_query: int) -> None:
    """Check the names of the `source` and the shapes of the converted `state` against the `wanted` shapes.

    Raises RuntimeError if a source tensor is neither kept nor declared dropped, or if a converted tensor is missing,
    unknown or of the wrong shape.
    """
    declared = {
        f"blocks.{layer}.{ATTENTION}.{name}" for layer in range(layers_with_factorized_query) for name in _QUERY
    }
    kept = {name for name in source if name in state and name in wanted}
    unaccounted = (set(source) - kept) ^ declared
    if unaccounted:
        raise RuntimeError(f"source tensors neither used, kept nor declared dropped: {sorted(unaccounted)[:4]}")
    wrong = [name for name in wanted if state.get(name) != wanted[name]] + [n for n in state if n not in wanted]
    if wrong:
        raise RuntimeError(f"converted tensors missing, unknown or of the wrong shape: {wrong[:4]}")
