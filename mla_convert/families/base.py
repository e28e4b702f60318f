"""What the rest of the package needs to know about a model family."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import diffusers
from torch import Tensor

from ..mla.attention import AttentionPass

Config = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
ConditionKind = Literal["frames", "fixed"]
"""Of a condition of a rollout: one `[B, c, F, ...]` whose frames are those of the chunk, or one for the whole video."""


@dataclass(frozen=True)
class Geometry:
    """Self-attention of a dense model."""

    num_layers: int
    num_heads: int
    head_dim: int

    @property
    def dense_scalars_per_token(self) -> int:
        """Cached scalars a token a layer of the dense model: a key and a value for every head."""
        return 2 * self.num_heads * self.head_dim


def stock_geometry(config: Config) -> Geometry:
    """The geometry under the keys that diffusers' video transformers share."""
    return Geometry(config["num_layers"], config["num_attention_heads"], config["attention_head_dim"])


def noise_channels(config: Config) -> int:
    """Channels of the latents that a model makes, 16 where its configuration leaves that to the stock class.

    What it reads beside them is a condition, an image say.
    """
    return int(config.get("out_channels") or config.get("in_channels") or 16)


class BlockInputs(NamedTuple):
    """One batch on its way through the blocks, as a dense class's `enter` prepares it.

    `tokens` `[B, S, C]` are what the first block gets; every block gets its tokens and `shared`:
    `text` `[B, L, C]`, `modulation` `[B, T, 6, C]` (T runs of tokens) and the attention pass `step`.
    `temb` `[B, T, C]` and `size`, the (F, H, W) of the latent, are for `leave`.
    """

    tokens: Tensor
    text: Tensor
    modulation: Tensor
    step: AttentionPass
    temb: Tensor
    size: tuple[int, int, int]

    @property
    def shared(self) -> tuple[Tensor, Tensor, AttentionPass]:
        """Arguments of every block after its tokens."""
        return self.text, self.modulation, self.step


@dataclass(frozen=True)
class Family:
    """A family of transformers: its stock classes by name, our dense and our converted class.

    For conversion a dense class offers its layers as `blocks`, each with its self-attention as
    `attn1` (a `DenseSelfAttention`), and everything around them as `enter(hidden_states, timestep,
    encoder_hidden_states, context=...) -> BlockInputs` and `leave(tokens, inputs) -> velocity`, so
    that `leave(blocks(enter(...)))` is its forward: blocks can then be read, run and dropped one at
    a time. It also has `causal`, `rope` and `rotary_table()`. The converted class takes the same
    configuration with `mla` beside it and differs in `attn1` alone.

    `geometry` reads a configuration of any of them. `near_misses` names related classes that cannot
    be converted, each with the reason; `near_miss_tensors` does the same by a part of a tensor's name.

    Five hooks import files that are not in diffusers layout. `stored_names` maps our tensor names to
    those of a file, or gives None when it does not know the layout. `original_names` maps the names of another
    layout to our names, for adapters that are called by it. `foreign_classes` are classes of
    other repositories whose configuration `stock_config` turns into a stock one; it gets the stored
    configuration and the shapes under our names (empty when only the configuration is there yet), and
    gives None for a configuration that needs no translation. `infer_config` reads a stock
    configuration off shapes alone, or gives None when they are of another family. The last two raise
    UserError for a model that cannot be converted or leaves something open.

    Making one makes its classes attributes of `diffusers`, where a pipeline's model_index.json looks.
    Raises ValueError if diffusers or another family has a class of that name.
    """

    name: str
    source_classes: tuple[str, ...]
    dense_class: type[Any]
    mla_class: type[Any]
    geometry: Callable[[Config], Geometry] = stock_geometry
    near_misses: Mapping[str, str] = field(default_factory=dict)
    stored_names: Callable[[Collection[str]], dict[str, str] | None] = lambda names: None
    original_names: Callable[[Collection[str]], dict[str, str]] = lambda names: {}
    foreign_classes: tuple[str, ...] = ()
    near_miss_tensors: Mapping[str, str] = field(default_factory=dict)
    stock_config: Callable[[Config, Shapes], dict[str, Any] | None] = lambda stored, shapes: None
    infer_config: Callable[[Shapes], dict[str, Any] | None] = lambda shapes: None

    def __post_init__(self) -> None:
        """Make both classes attributes of `diffusers`, where pipelines look for the models they load."""
        for model_class in (self.dense_class, self.mla_class):
            name = model_class.__name__
            holder = getattr(diffusers, name, model_class).__module__
            if holder != model_class.__module__:
                raise ValueError(f"family {self.name}: {holder} has a class {name} already")
            setattr(diffusers, name, model_class)
            # A pipeline that is saved names the class by its module, in which diffusers then looks for the base class.
            vars(sys.modules[model_class.__module__])["ModelMixin"] = diffusers.ModelMixin
