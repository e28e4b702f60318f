"""Defines Wan2.1 and Wan2.2 as causal, streaming transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn

from ..mla.image import IMAGE, TOKENS
from ..mla.rope import RotaryTable, wan_rotary_table
from .base import ConditionKind, Family
from .block import CausalBlock, wan_block_arguments
from .causal import CausalTransformer, LatentTransformer
from .image import needed_conditions
from .signature import takes
from .wan_files import NEAR_MISS_TENSORS, NEAR_MISSES, infer_config, original_names, stock_config, stored_names


class CausalWanBlock(CausalBlock, WanTransformerBlock):
    """A Wan block whose timestep may differ from frame to frame."""


class CausalWanTransformer3DModel(CausalTransformer, WanTransformer3DModel):
    """`WanTransformer3DModel` with block-causal self-attention and a streaming forward.

    An image-to-video model reads more channels than it generates. The others are the condition `image_latents`
    `[B, c, F, H, W]`, c = `in_channels - out_channels`: for Wan, a mask and the encoded image. Latents that already
    include them, as from diffusers' pipelines, are also accepted. Wan2.1's models also read the image's CLIP tokens,
    `encoder_hidden_states_image` `[B, 257, image_dim]`.
    """

    _no_split_modules = ["CausalWanBlock"]
    _repeated_blocks = ["CausalWanBlock"]
    condition_kinds: ClassVar[Mapping[str, ConditionKind]] = {IMAGE: "frames", TOKENS: "fixed"}

    @register_to_config
    @takes(WanTransformer3DModel, causal=None)
    def __init__(self, **config: Any) -> None:
        super().__init__(**config)

    def make_block(self) -> nn.Module:
        return CausalWanBlock(*wan_block_arguments(self.config))

    @property
    def needed_conditions(self) -> tuple[str, ...]:
        return needed_conditions(self.config)

    def patch(self, hidden_states: Tensor, image_latents: Tensor | None = None) -> Tensor:
        """Tokens `[B, S, C]` of a latent `[B, out_channels, F, H, W]` and `image_latents`, or of both in one tensor.

        Raises ValueError unless both together have `in_channels` channels.
        """
        parts = [hidden_states] if image_latents is None else [hidden_states, image_latents.to(hidden_states)]
        found, wanted = sum(part.shape[1] for part in parts), self.config.in_channels
        if found != wanted:
            missing = wanted - hidden_states.shape[1]
            given = "no image_latents" if image_latents is None else f"image_latents of {image_latents.shape[1]}"
            raise ValueError(
                f"the model reads {wanted} channels, but there are hidden_states of {hidden_states.shape[1]} and "
                f"{given}; "
                + (f"give image_latents of {missing} channels" if missing > 0 else "leave image_latents out")
            )
        return super().patch(torch.cat(parts, dim=1))

    def rotary_table(self) -> RotaryTable:
        return wan_rotary_table(self.rope)

    def embed_conditions(
        self, timestep: Tensor, encoder_hidden_states: Tensor, encoder_hidden_states_image: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        runs = 1 if timestep.ndim == 1 else timestep.shape[1]
        temb, modulation, text, image = self.condition_embedder(
            timestep.flatten(), encoder_hidden_states, encoder_hidden_states_image, timestep_seq_len=runs
        )
        return temb, modulation.unflatten(2, (6, -1)), text, image


class MLAWanTransformer3DModel(LatentTransformer, CausalWanTransformer3DModel):
    """Wan with latent self-attention."""

    @register_to_config
    @takes(CausalWanTransformer3DModel, mla=None)
    def __init__(self, **config: Any) -> None:
        super().__init__(**config)


FAMILY = Family(
    name="wan",
    source_classes=("WanTransformer3DModel", "CausalWanTransformer3DModel"),
    dense_class=CausalWanTransformer3DModel,
    mla_class=MLAWanTransformer3DModel,
    foreign_classes=("WanModel", "CausalWanModel"),
    near_misses=NEAR_MISSES,
    near_miss_tensors=NEAR_MISS_TENSORS,
    stored_names=stored_names,
    original_names=original_names,
    stock_config=stock_config,
    infer_config=infer_config,
)
