"""Defines `Family`, the description of a model family that the rest of the package works with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import diffusers
import torch
from torch import Tensor

from ..mla.attention import AttentionPass
from ..mla.parallel import Share

Config = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
ConditionKind = Literal["frames", "fixed"]
"""The kind of a rollout's condition: `frames` is `[B, c, F, ...]`, sliced per chunk; `fixed` is for the whole video."""


@dataclass(frozen=True)
class AttentionGeometry:
    """Sizes of a dense model's self-attention."""

    num_layers: int
    num_heads: int
    head_dim: int

    @property
    def dense_scalars_per_token(self) -> int:
        """Cached scalars per token per layer of the dense model: a key and a value for every head."""
        return 2 * self.num_heads * self.head_dim


def attention_geometry(config: Config) -> AttentionGeometry:
    """The geometry from the configuration keys that diffusers' video transformers share."""
    return AttentionGeometry(config["num_layers"], config["num_attention_heads"], config["attention_head_dim"])


def noise_channels(config: Config) -> int:
    """Channels of the latents that a model generates; 16 where the configuration leaves this to the stock class.

    Any other channels that it reads are a condition, such as an image.
    """
    return int(config.get("out_channels") or config.get("in_channels") or 16)


class BlockInputs(NamedTuple):
    """The inputs of a model's blocks for one batch, as prepared by `enter`.

    `tokens` `[B, S, C]` is the input of the first block. Every block gets tokens and `shared`: `text` `[B, L, C]`,
    `modulation` `[B, T, 6, C]` (T runs of tokens) and the attention pass `step`. `leave` needs `temb` `[B, T, C]` and
    `size`, the (F, H, W) of the latent.
    """

    tokens: Tensor
    text: Tensor
    modulation: Tensor
    step: AttentionPass
    temb: Tensor
    size: tuple[int, int, int]

    def shared_by(self, group: Any) -> BlockInputs:
        """The part of this process where those of `group` share the chunk. Raises ValueError with gradients.

        In the first pass over a cache, or over a chunk of a pool with which a stream begins, raises UserError if the
        processes have different tokens or text.
        """
        if self.tokens.requires_grad and torch.is_grad_enabled():
            raise ValueError("processes share a chunk without gradients only; call set_parallel(None) before training")
        tokens = self.tokens.shape[1]
        share, cache = Share(group, tokens), self.step.cache
        if cache is not None and not cache.compared:
            cache.compared = True
            share.check_same(self.tokens)
            share.check_same(self.text)
        return self._replace(
            tokens=self.tokens[:, share.tokens],
            modulation=share.runs(self.modulation, tokens),
            temb=share.runs(self.temb, tokens),
            step=replace(self.step, share=share),
        )

    @property
    def shared(self) -> tuple[Tensor, Tensor, AttentionPass]:
        """Arguments of every block after its tokens."""
        return self.text, self.modulation, self.step


@dataclass(frozen=True)
class Family:
    """A family of transformers: the names of its stock classes, and our dense and converted classes.

    For conversion, a dense class has its layers in `blocks`, each with its self-attention in `attn1` (a
    `DenseSelfAttention`). Everything around the blocks is in `enter(hidden_states, timestep, encoder_hidden_states,
    context=...) -> BlockInputs` and `leave(tokens, inputs) -> velocity`. The forward is `leave(blocks(enter(...)))`, so
    blocks can be read, run and dropped one at a time. The class also has `causal`, `rope` and `rotary_table()`. The
    converted class takes the same configuration plus `mla` and differs only in `attn1`.

    `near_misses` maps related classes that cannot be converted to the reason. `near_miss_tensors` does the same by a
    part of a tensor's name.

    Five hooks import files that are not in diffusers layout. `stored_names` maps our tensor names to those of a file,
    or returns None for an unknown layout. `original_names` maps the names of another layout to ours, for adapters that
    use it. `foreign_classes` are classes of other repositories whose configuration `stock_config` translates into a
    stock one. `stock_config` gets the stored configuration and the shapes under our names (empty while only the
    configuration is known) and returns None if no translation is needed. `infer_config` derives a stock configuration
    from shapes alone, or returns None for those of another family. The last two raise UserError for a model that cannot
    be converted or is ambiguous.

    Creating a `Family` makes its classes attributes of `diffusers`, where a pipeline's model_index.json looks. Raises
    ValueError if diffusers or another family already has a class of that name.
    """

    name: str
    source_classes: tuple[str, ...]
    dense_class: type[Any]
    mla_class: type[Any]
    near_misses: Mapping[str, str] = field(default_factory=dict)
    stored_names: Callable[[Collection[str]], dict[str, str] | None] = lambda names: None
    original_names: Callable[[Collection[str]], dict[str, str]] = lambda names: {}
    foreign_classes: tuple[str, ...] = ()
    near_miss_tensors: Mapping[str, str] = field(default_factory=dict)
    stock_config: Callable[[Config, Shapes], dict[str, Any] | None] = lambda stored, shapes: None
    infer_config: Callable[[Shapes], dict[str, Any] | None] = lambda shapes: None

    def __post_init__(self) -> None:
        """Make both classes attributes of `diffusers`, where pipelines look up the models to load."""
        for model_class in (self.dense_class, self.mla_class):
            name = model_class.__name__
            holder = getattr(diffusers, name, model_class).__module__
            if holder != model_class.__module__:
                raise ValueError(f"family {self.name}: {holder} already has a class {name}; rename yours")
            setattr(diffusers, name, model_class)
            # A saved pipeline names the class by its module, and diffusers looks for the base class in that module.
            vars(sys.modules[model_class.__module__])["ModelMixin"] = diffusers.ModelMixin
