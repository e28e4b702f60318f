"""Defines SkyReels-V2's diffusion-forcing models, 1.3B and 14B (arXiv 2504.13074), as causal, streaming transformers.

Diffusers runs them without a cache and computes the history again in every step. With per-frame timesteps and a
block-causal mask, history does not depend on later frames, so it can be cached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import SkyReelsV2Transformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2TransformerBlock
from torch import Tensor, nn

from ..mla.rope import RotaryTable, wan_rotary_table
from ..mla.window import CausalConfig
from . import wan_files
from .base import ConditionKind, Family, Shapes
from .block import CausalBlock, wan_block_arguments
from .causal import CausalTransformer, LatentTransformer
from .signature import takes

# From the pipeline's documentation: blocks of 5 latent frames, and clips of 97 frames at 540p (25 latent frames).
FRAMES_PER_BLOCK, CLIP_FRAMES = 5, 25
# Row of the embedding for all frame rates except 16, whose row is 0.
FPS_24 = 1


class CausalSkyReelsV2Block(CausalBlock, SkyReelsV2TransformerBlock):
    """A SkyReels-V2 block whose timestep may differ from frame to frame."""


class CausalSkyReelsV2Transformer3DModel(CausalTransformer, SkyReelsV2Transformer3DModel):
    """`SkyReelsV2Transformer3DModel` with block-causal self-attention and a streaming forward.

    `num_frame_per_block` in the configuration follows `causal`. A model with `inject_sample_info` takes the condition
    `fps`, int64 `[B]`: 0 for 16 frames per second, 1 for 24 (the default). Raises ValueError for an image-to-video
    model.
    """

    condition_kinds: ClassVar[Mapping[str, ConditionKind]] = {"fps": "fixed"}
    fps_embedding: Any
    fps_projection: Any
    _no_split_modules = ["CausalSkyReelsV2Block"]
    _repeated_blocks = ["CausalSkyReelsV2Block"]

    @register_to_config
    @takes(SkyReelsV2Transformer3DModel, causal=None)
    def __init__(self, **config: Any) -> None:
        extras = [key for key in ("image_dim", "added_kv_proj_dim") if config[key] is not None]
        if extras:
            raise ValueError(
                f"a configuration with {' and '.join(extras)} is an image-to-video model, which is bidirectional; use "
                "a diffusion-forcing (DF) model, which can start from an image"
            )
        super().__init__(**config)
        self._set_ar_attention(self.causal.num_frames_per_block)

    def default_causal(self) -> dict[str, Any]:
        """The blocks of the stock configuration, in a window of one 540p clip; a stock block of 1 means no mask."""
        frames = self.config.num_frame_per_block
        frames = frames if frames > 1 else FRAMES_PER_BLOCK
        return {"num_frames_per_block": frames, "window_frames": max(frames, CLIP_FRAMES)}

    def _set_ar_attention(self, causal_block_size: int) -> None:
        """Set the latent frames of a chunk; diffusers' pipelines call this.

        Raises ValueError when the window cannot hold a chunk.
        """
        self.causal = CausalConfig(**self.causal.model_dump() | {"num_frames_per_block": causal_block_size})
        register: Any = self.register_to_config
        register(num_frame_per_block=causal_block_size, causal=self.causal.model_dump(mode="json"))

    def make_block(self) -> nn.Module:
        return CausalSkyReelsV2Block(*wan_block_arguments(self.config))

    def rotary_table(self) -> RotaryTable:
        return wan_rotary_table(self.rope)

    def embed_conditions(
        self,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None,
        fps: Tensor | Sequence[int] | None = None,
        enable_diffusion_forcing: bool | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `CausalTransformer`. diffusers' pipelines pass `fps` as a list, and `enable_diffusion_forcing`.

        The flag is ignored: the shape of `timestep` says the same.
        """
        temb, modulation, text, image = self.condition_embedder(
            timestep, encoder_hidden_states, encoder_hidden_states_image
        )
        if timestep.ndim == 1:
            temb, modulation = temb.unsqueeze(1), modulation.unsqueeze(1)
        if self.config.inject_sample_info:
            if fps is None:
                # Created on the device, because a CUDA graph cannot capture a copy from the host.
                index = torch.full((len(timestep),), FPS_24, device=modulation.device)
            else:
                index = torch.as_tensor(fps, device=modulation.device)
            modulation = modulation + self.fps_projection(self.fps_embedding(index)).unsqueeze(1)
        return temb, modulation.unflatten(2, (6, -1)), text, image


class MLASkyReelsV2Transformer3DModel(LatentTransformer, CausalSkyReelsV2Transformer3DModel):
    """SkyReels-V2 with latent self-attention."""

    @register_to_config
    @takes(CausalSkyReelsV2Transformer3DModel, mla=None)
    def __init__(self, **config: Any) -> None:
        super().__init__(**config)


def _infer_config(shapes: Shapes) -> dict[str, Any] | None:
    """Stock configuration from shapes; None without the frame-rate embedding, where the model equals one of Wan's."""
    if "fps_embedding.weight" not in shapes:
        return None
    config = wan_files.infer_config(shapes)
    return None if config is None else config | {"inject_sample_info": True}


FAMILY = Family(
    name="skyreels_v2",
    source_classes=("SkyReelsV2Transformer3DModel", "CausalSkyReelsV2Transformer3DModel"),
    dense_class=CausalSkyReelsV2Transformer3DModel,
    mla_class=MLASkyReelsV2Transformer3DModel,
    infer_config=_infer_config,
)
