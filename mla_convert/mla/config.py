"""Defines the `mla` section of a converted model's config.json, with DeepSeek's names."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Position = Literal["decoupled", "derived", "baked", "rotate_on_read"]
OwnChunk = Literal["exact", "latent"]
CACHE_KEY: tuple[Position, ...] = ("decoupled", "baked")
"""The positions for which a cache row also has a shared rotary key."""


def check_shared_latent(layers_per_latent: int, position: Position, own_chunk: OwnChunk) -> None:
    """Raise ValueError for a layout in which several layers cannot share a latent."""
    if layers_per_latent == 1:
        return
    if own_chunk != "exact":
        raise ValueError(
            "layers_per_latent above 1 needs own_chunk exact: a shared latent is complete only after the last of its "
            "layers"
        )
    if position not in ("rotate_on_read", "derived"):
        raise ValueError(
            f"layers_per_latent above 1 needs position rotate_on_read or derived: {position} caches a rotary key for "
            "every layer"
        )


def latent_groups(layers: int, layers_per_latent: int = 1) -> list[range]:
    """The layers that share each latent, in a model of `layers` layers."""
    return [range(first, first + layers_per_latent) for first in range(0, layers, layers_per_latent)]


class MLAConfig(BaseModel):
    """Latent attention of every layer; tuples hold one entry per layer.

    `position` says where the position of a cached token is stored:

    - `decoupled`: in a shared rotary key that is cached beside the latent (VideoMLA, arXiv
      2605.30351; DeepSeek-V2, arXiv 2405.04434);
    - `derived`: in shared rotary keys that are computed from the latent when it is read;
    - `baked`: height and width in the latent itself, time in a cached shared rotary key;
    - `rotate_on_read`: in every head's own keys, expanded from the latent and then rotated.

    With `own_chunk="exact"`, the chunk that is being denoised attends to itself with its own dense keys and values;
    only history goes through the latent.

    `rope_pairs` lists the model's rotary pairs that the shared key carries, one per two of its `qk_rope_head_dim`
    channels; a pair may occur more than once. `nope_pairs` lists the pairs whose channels, unrotated, are restored from
    the latent for every head. With `key_mean`, every head has a constant key that is added to the keys of all tokens,
    rotated in full by each token's position.

    `layers_per_latent` consecutive layers share one latent of `kv_lora_rank` numbers per token, which is cached once.
    Each of these layers adds its own projection of its keys and values, and restores its own from the whole latent. The
    latent is complete only after the last of them, so this needs an exact own chunk, and a layout that caches only the
    latent.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    position: Position
    own_chunk: OwnChunk
    kv_lora_rank: tuple[int, ...]
    q_lora_rank: int | None = None
    v_head_dim: int
    rope_pairs: tuple[tuple[int, ...], ...]
    nope_pairs: tuple[tuple[int, ...], ...]
    key_mean: bool = False
    layers_per_latent: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _one_entry_a_layer(self) -> MLAConfig:
        layers = len(self.kv_lora_rank)
        if len(self.rope_pairs) != layers or len(self.nope_pairs) != layers:
            raise ValueError(f"kv_lora_rank, rope_pairs and nope_pairs must have one entry for each of {layers} layers")
        if min(self.kv_lora_rank) < 1:
            raise ValueError("kv_lora_rank must be at least 1 in every layer")
        return self

    @model_validator(mode="after")
    def _latents_that_can_be_shared(self) -> MLAConfig:
        check_shared_latent(self.layers_per_latent, self.position, self.own_chunk)
        layers = len(self.kv_lora_rank)
        if layers % self.layers_per_latent:
            raise ValueError(f"{layers} layers cannot share latents {self.layers_per_latent} at a time")
        if any(len({self.kv_lora_rank[layer] for layer in group}) > 1 for group in self.latent_groups()):
            raise ValueError("layers that share a latent must have the same kv_lora_rank")
        return self

    def latent_groups(self) -> list[range]:
        """The layers that share each latent."""
        return latent_groups(len(self.kv_lora_rank), self.layers_per_latent)

    def row_layer(self, layer: int) -> int:
        """The layer whose cache rows hold the latent of `layer`: the first of the layers that share it."""
        return layer - layer % self.layers_per_latent

    def qk_rope_head_dim(self, layer: int) -> int:
        """Channels of a layer's shared rotary key."""
        return 2 * len(self.rope_pairs[layer])

    def qk_nope_head_dim(self, layer: int) -> int:
        """Unrotated key channels per head of a layer, restored from the latent."""
        return 2 * len(self.nope_pairs[layer])

    def row_parts(self, layer: int) -> tuple[int, int]:
        """Scalars of the latent and of the shared key that a layer caches per token; see `row_width`."""
        if self.row_layer(layer) != layer:
            return 0, 0
        shared_key = self.qk_rope_head_dim(layer) if self.position in CACHE_KEY else 0
        return self.kv_lora_rank[layer], shared_key

    def row_width(self, layer: int) -> int:
        """Cached scalars per token of a layer; 0 where its latent is stored in the rows of another layer."""
        return sum(self.row_parts(layer))

    def scalars_per_token(self) -> float:
        """Cached scalars per token, averaged over layers."""
        layers = len(self.kv_lora_rank)
        return sum(self.row_width(layer) for layer in range(layers)) / layers
