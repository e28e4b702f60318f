"""Check a conversion's ranks against the geometry of the model, before any weight is read."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import UsageError
from ..families.base import AttentionGeometry
from .budget import candidate_ranks
from .config import ConvertConfig
from .rope_key import check_rotary_key


class Ranks(NamedTuple):
    """`fitted` is the rank at which each layer is fitted; `measured` are the ranks whose error a budget measures."""

    fitted: list[int]
    measured: list[int]


def planned_ranks(geometry: AttentionGeometry, axes: tuple[int, ...], config: ConvertConfig) -> Ranks:
    """The rank at which each layer is fitted: its `kv_lora_rank`, or the largest that a budget may choose.

    `axes` is the axis of each rotary pair. Raises UsageError for a rank or group size that the model cannot have.
    """
    layers, shared = geometry.num_layers, config.layers_per_latent
    if layers % shared:
        possible = ", ".join(str(count) for count in range(1, layers + 1) if layers % count == 0)
        problem = f"{layers} layers cannot share latents {shared} at a time"
        raise UsageError(f"convert.layers_per_latent: {problem}; one of {possible}")
    inner = geometry.num_heads * geometry.head_dim
    if config.q_lora_rank is not None and config.q_lora_rank > inner:
        raise UsageError(f"convert.q_lora_rank: {config.q_lora_rank} is larger than the rank {inner} of the queries")
    try:
        check_rotary_key(config, geometry.num_heads, axes)
    except ValueError as error:
        raise UsageError(f"convert.qk_rope_head_dim: {error}") from None
    limit = geometry.dense_scalars_per_token * shared
    if config.budget is not None:
        measured = candidate_ranks(config.budget, latent_scalars(geometry, config), limit)
        return Ranks([measured[-1]] * layers, measured)
    try:
        ranks = config.ranks(layers)
    except ValueError as error:
        raise UsageError(f"convert.kv_lora_rank: {error}") from None
    for layer, rank in enumerate(ranks):
        if rank > limit:
            of_all = "" if shared == 1 else f" of {shared} layers"
            problem = f"{rank} in layer {layer} is not between 1 and {limit}, the width of [k; v]{of_all}"
            raise UsageError(f"convert.kv_lora_rank: {problem}")
    return Ranks(ranks, [])


def latent_scalars(geometry: AttentionGeometry, config: ConvertConfig) -> float | None:
    """Mean rank of a latent under the budget, less the cached shared key; None for a `loss_increase`."""
    assert config.budget is not None
    scalars = config.budget.scalars(geometry.dense_scalars_per_token)
    # (1 - 0.9) * 3840 is a little less than 384, so unrounded it would be one rank_multiple short.
    return None if scalars is None else round(config.layers_per_latent * (scalars - config.cached_key), 6)
