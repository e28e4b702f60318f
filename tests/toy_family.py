"""Toy, a video transformer that mla-convert does not know, and the family that makes it convertible."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn

from mla_convert.families.base import ConditionKind, Family, Shapes
from mla_convert.families.block import CausalBlock
from mla_convert.families.causal import CausalTransformer, LatentTransformer
from mla_convert.families.signature import takes
from mla_convert.mla.rope import HEIGHT, TIME, WIDTH, RotaryTable


class ToyTransformer3DModel(ModelMixin, ConfigMixin):
    """The stock model: bidirectional, conditioned on text and on how much moves."""

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 2,
        attention_head_dim: int = 12,
        in_channels: int = 2,
        out_channels: int = 2,
        text_dim: int = 8,
        ffn_dim: int = 24,
        num_layers: int = 2,
        eps: float = 1e-6,
        rope_theta: float = 500.0,
        motion_levels: int = 3,
    ) -> None:
        super().__init__()
        inner = num_attention_heads * attention_head_dim
        self.patch_embedding = nn.Conv3d(in_channels, inner, patch_size, patch_size)
        self.time_in, self.motion_in = TimestepEmbedding(16, inner), nn.Embedding(motion_levels, inner)
        self.modulation_in, self.text_in = nn.Linear(inner, 6 * inner), nn.Linear(text_dim, inner)
        self.blocks = nn.ModuleList(
            WanTransformerBlock(inner, ffn_dim, num_attention_heads, eps=eps) for _ in range(num_layers)
        )
        self.norm_out = FP32LayerNorm(inner, eps, elementwise_affine=False)
        self.proj_out = nn.Linear(inner, out_channels * math.prod(patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, inner) / inner**0.5)
        self.gradient_checkpointing = False

    def conditions(self, timestep: Tensor, motion: Tensor | None) -> tuple[Tensor, Tensor]:
        """`[B, C]` and `[B, 6, C]` for `timestep` `[B]` and `motion`, int64 `[B]`, 0 when left out."""
        motion = torch.zeros_like(timestep, dtype=torch.long) if motion is None else motion
        temb = self.time_in(get_timestep_embedding(timestep, 16).to(self.dtype)) + self.motion_in(motion)
        return temb, self.modulation_in(F.silu(temb)).unflatten(-1, (6, -1))

    def rotations(self) -> Tensor:
        """By index and pair, complex64 `[1024, head_dim / 2]`."""
        pairs = self.config.attention_head_dim // 2
        angles = torch.outer(torch.arange(1024.0), self.config.rope_theta ** -(torch.arange(pairs) / pairs))
        return torch.polar(torch.ones_like(angles), angles)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        motion: Tensor | None = None,
    ) -> Transformer2DModelOutput:
        """Velocity of `hidden_states` `[B, C, F, H, W]` at `timestep` `[B]`, text `[B, L, text_dim]`."""
        patches = self.patch_embedding(hidden_states)
        grid = torch.cartesian_prod(*(torch.arange(size) for size in patches.shape[2:]))
        third = self.config.attention_head_dim // 6
        cis = self.rotations()[grid.repeat_interleave(third, 1), torch.arange(3 * third)]
        cos_sin = tuple(part.repeat_interleave(2, -1)[None, :, None] for part in (cis.real, cis.imag))
        tokens, text = patches.flatten(2).transpose(1, 2), self.text_in(encoder_hidden_states)
        temb, modulation = self.conditions(timestep, motion)
        for block in self.blocks:
            tokens = block(tokens, text, modulation, cos_sin)
        shift, scale = (self.scale_shift_table + temb.unsqueeze(1)).unsqueeze(2).unbind(1)
        patch = self.proj_out(self.norm_out(tokens) * (1 + scale) + shift)
        patch = patch.view(len(patch), *patches.shape[2:], *self.config.patch_size, -1)
        return Transformer2DModelOutput(sample=patch.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(hidden_states.shape))


class CausalToyBlock(CausalBlock, WanTransformerBlock):
    """A Toy block whose timestep may differ from frame to frame."""


class CausalToyTransformer3DModel(CausalTransformer, ToyTransformer3DModel):
    """`ToyTransformer3DModel` with block-causal self-attention; `motion` is a condition, int64 `[B]`."""

    _no_split_modules = ["CausalToyBlock"]
    _repeated_blocks = ["CausalToyBlock"]
    condition_kinds: ClassVar[Mapping[str, ConditionKind]] = {"motion": "fixed"}

    @register_to_config
    @takes(ToyTransformer3DModel, causal=None)
    def __init__(self, **config: Any) -> None:
        if config["attention_head_dim"] % 6:
            raise ValueError(f"attention_head_dim={config['attention_head_dim']} is not a multiple of 6")
        super().__init__(**config)

    def default_causal(self) -> dict[str, Any]:
        return {"num_frames_per_block": 2, "window_frames": 16}

    def make_block(self) -> nn.Module:
        config, heads = self.config, self.config.num_attention_heads
        return CausalToyBlock(heads * config.attention_head_dim, config.ffn_dim, heads, eps=config.eps)

    def rotary_table(self) -> RotaryTable:
        third = self.config.attention_head_dim // 6
        return RotaryTable(self.rotations().to(self.device), (TIME,) * third + (HEIGHT,) * third + (WIDTH,) * third)

    def embed_conditions(
        self,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None,
        motion: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        runs = timestep.reshape(len(timestep), -1)
        motion = None if motion is None else motion.repeat_interleave(runs.shape[1])
        temb, modulation = (x.unflatten(0, runs.shape) for x in self.conditions(runs.flatten(), motion))
        return temb, modulation, self.text_in(encoder_hidden_states), None


class MLAToyTransformer3DModel(LatentTransformer, CausalToyTransformer3DModel):
    """Toy with latent self-attention."""

    @register_to_config
    @takes(CausalToyTransformer3DModel, mla=None)
    def __init__(self, **config: Any) -> None:
        super().__init__(**config)


def stored_names(names: Collection[str]) -> dict[str, str] | None:
    """The research repository calls the blocks `layers`."""
    if not any(name.startswith("layers.") for name in names):
        return None
    return {name.replace("layers.", "blocks.", 1): name for name in names}


def infer_config(shapes: Shapes) -> dict[str, Any] | None:
    """Every published Toy has heads of 12 channels; `motion_in` tells that it is one."""
    if "motion_in.weight" not in shapes:
        return None
    levels, inner = shapes["motion_in.weight"]
    return {
        "num_attention_heads": inner // 12,
        "attention_head_dim": 12,
        "text_dim": shapes["text_in.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
        "motion_levels": levels,
    }


FAMILY = Family(
    name="toy",
    source_classes=("ToyTransformer3DModel", "CausalToyTransformer3DModel"),
    dense_class=CausalToyTransformer3DModel,
    mla_class=MLAToyTransformer3DModel,
    near_misses={"ToyControlTransformer3DModel": "its control branch is not part of the causal model"},
    near_miss_tensors={"control_in": "its control branch is not part of the causal model"},
    stored_names=stored_names,
    infer_config=infer_config,
)
