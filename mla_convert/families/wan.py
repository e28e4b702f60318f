"""Wan2.1 as a causal, streaming transformer: the dense form.

The dense form has the parameters of diffusers' `WanTransformer3DModel` name for name, so a stock
checkpoint loads into it unchanged; it is the teacher, the baseline and the lossless reference.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ..mla.attention import AttentionPass, CausalSelfAttention, DenseSelfAttention, clip_pass, stream_pass
from ..mla.cache import DenseCache, FrameCache, LatentCache
from ..mla.config import MLAConfig
from ..mla.latent import LatentSelfAttention
from ..mla.rope import RotaryTable, wan_rotary_table
from ..mla.window import CausalConfig
from .base import BlockInputs, Config, Family, Geometry
from .wan_block import CausalWanBlock, modulate
from .wan_files import infer_config, stored_names


class CausalWanTransformer3DModel(WanTransformer3DModel):
    """`WanTransformer3DModel` with block-causal self-attention and a streaming forward.

    `causal` is a `CausalConfig` as a dict. Everything else is the stock configuration.
    """

    _no_split_modules = ["CausalWanBlock"]
    _repeated_blocks = ["CausalWanBlock"]
    _supports_qkv_fusion = False
    cache_class: type[FrameCache] = DenseCache

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        causal: dict[str, Any] | None = None,
    ) -> None:
        stock = {k: v for k, v in locals().items() if k not in ("self", "causal", "__class__")}
        super().__init__(**{**stock, "num_layers": 0})
        self.register_to_config(num_layers=num_layers)
        if patch_size[0] != 1:
            raise ValueError(f"temporal patches of {patch_size[0]} frames are not supported, only 1")
        self.causal = CausalConfig(**(causal or {}))
        dim = num_attention_heads * attention_head_dim
        self.blocks = nn.ModuleList(
            CausalWanBlock(dim, ffn_dim, num_attention_heads, qk_norm, cross_attn_norm, eps, added_kv_proj_dim)
            for _ in range(num_layers)
        )
        for layer, block in enumerate(self.blocks):
            block.attn1 = self.make_attention(layer)

    def make_attention(self, layer: int) -> CausalSelfAttention:
        """The self-attention of one block."""
        heads, head_dim = self.config.num_attention_heads, self.config.attention_head_dim
        return DenseSelfAttention(heads * head_dim, heads, head_dim, self.config.eps, layer)

    def rotary_table(self) -> RotaryTable:
        """Rotations by index, on the model's device."""
        rope = self.rope
        return wan_rotary_table(rope.freqs_cos, rope.freqs_sin, rope.t_dim, rope.h_dim, rope.w_dim)

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Tokens down and across for a latent of `height x width`. Raises ValueError if it does not divide."""
        _, p_h, p_w = self.config.patch_size
        if height % p_h or width % p_w:
            raise ValueError(f"a latent of {height}x{width} does not divide into patches of {p_h}x{p_w}")
        return height // p_h, width // p_w

    def init_cache(
        self,
        batch_size: int,
        height: int,
        width: int,
        window_frames: int | None = None,
        sink_frames: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> FrameCache:
        """An empty cache for latents of `height x width`; window and sinks default to the model's."""
        changes = {"window_frames": window_frames, "sink_frames": sink_frames}
        settings = self.causal.model_dump() | {k: v for k, v in changes.items() if v is not None}
        rows, columns = self.token_grid(height, width)
        blocks: Any = self.blocks
        return self.cache_class(
            CausalConfig(**settings),
            [block.attn1.row_width for block in blocks],
            batch_size,
            rows,
            columns,
            dtype or self.dtype,
            device or self.device,
        )

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        context: Tensor | None = None,
        context_timestep: Tensor | None = None,
    ) -> Any:
        """Block-causal velocity of a whole clip.

        `hidden_states` `[B, C, F, H, W]`; `timestep` `[B]`, `[B, F]` or one a token `[B, S]`;
        `encoder_hidden_states` `[B, L, text_dim]`.

        With `context` `[B', C, F, H, W]`, B a multiple of B', every chunk sees the history of
        `context` instead of its own noisy one (teacher forcing): item i reads context item i mod B'.
        `context_timestep` `[B']` or `[B', F]` is its noise level, 0 when left out.
        """
        sample = self._through_blocks(
            self.enter(
                hidden_states,
                timestep,
                encoder_hidden_states,
                encoder_hidden_states_image,
                context=context,
                context_timestep=context_timestep,
            )
        )
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def forward_chunk(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        cache: FrameCache,
        write: bool = False,
        encoder_hidden_states_image: Tensor | None = None,
    ) -> Tensor:
        """Velocity `[B, C, F, H, W]` of the next F frames of a rollout.

        With `write` the chunk's rows are kept and the rollout moves on by F frames.
        """
        frames = hidden_states.shape[2]
        if hidden_states.shape[0] != cache.batch_size:
            raise ValueError(f"the cache holds {cache.batch_size} items, hidden_states has {hidden_states.shape[0]}")
        if self.token_grid(*hidden_states.shape[3:]) != (cache.height, cache.width):
            raise ValueError(f"the cache is for {cache.height}x{cache.width} tokens a frame")
        step = stream_pass(self.rotary_table(), cache, frames, write)
        sample = self._through_blocks(
            self._embed(hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image, step)
        )
        if write:
            cache.frames_seen += frames
        return sample

    def enter(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        context: Tensor | None = None,
        context_timestep: Tensor | None = None,
    ) -> BlockInputs:
        """What the first block gets for a whole clip; the arguments are those of `forward`.

        With `context` its B' items come first in the batch of everything that is returned.
        """
        batch, _, frames, height, width = hidden_states.shape
        context_batch = None
        if context is not None:
            context_batch = context.shape[0]
            if batch % context_batch or context.shape[1:] != hidden_states.shape[1:]:
                shapes = f"{tuple(context.shape)} does not fit hidden_states {tuple(hidden_states.shape)}"
                raise ValueError(f"context {shapes}")
            if context_timestep is None:
                context_timestep = timestep.new_zeros((context_batch, *timestep.shape[1:]))
            elif context_timestep.ndim < timestep.ndim:
                context_timestep = context_timestep.unsqueeze(1).expand(-1, timestep.shape[1])
            hidden_states = torch.cat([context.to(hidden_states.dtype), hidden_states])
            timestep = torch.cat([context_timestep.to(timestep.dtype), timestep])
            encoder_hidden_states = torch.cat([encoder_hidden_states[:context_batch], encoder_hidden_states])
            if encoder_hidden_states_image is not None:
                encoder_hidden_states_image = torch.cat(
                    [encoder_hidden_states_image[:context_batch], encoder_hidden_states_image]
                )
        grid = self.token_grid(height, width)
        step = clip_pass(self.rotary_table(), self.causal, frames, *grid, context_batch=context_batch)
        return self._embed(hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image, step)

    def leave(self, tokens: Tensor, inputs: BlockInputs) -> Tensor:
        """Velocity `[B, C, F, H, W]` from the last block's `tokens` `[B' + B, S, C]`, context items left out."""
        frames, height, width = inputs.size
        rows, columns = self.token_grid(height, width)
        shift, scale = (self.scale_shift_table.unsqueeze(1) + inputs.temb.unsqueeze(2)).unbind(2)
        tokens = modulate(self.norm_out(tokens.float()), scale, shift).to(tokens.dtype)
        _, p_h, p_w = self.config.patch_size
        patches = self.proj_out(tokens).view(-1, frames, rows, columns, p_h, p_w, self.config.out_channels)
        sample = patches.permute(0, 6, 1, 2, 4, 3, 5).reshape(-1, self.config.out_channels, frames, height, width)
        return sample[inputs.step.context_batch or 0 :]

    def _embed(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None,
        step: AttentionPass,
    ) -> BlockInputs:
        frames, height, width = hidden_states.shape[2:]
        tokens = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
        temb, modulation, text, image = self.embed_conditions(
            timestep, encoder_hidden_states, encoder_hidden_states_image
        )
        if image is not None:
            text = torch.cat([image, text], dim=1)
        return BlockInputs(tokens, text, modulation, step, temb, (frames, height, width))

    def _through_blocks(self, inputs: BlockInputs) -> Tensor:
        tokens = inputs.tokens
        # What entered the first block is not kept while the others run.
        inputs = inputs._replace(tokens=tokens.new_empty(0))
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, *inputs.shared)
            else:
                tokens = block(tokens, *inputs.shared)
        return self.leave(tokens, inputs)

    def embed_conditions(
        self, timestep: Tensor, encoder_hidden_states: Tensor, encoder_hidden_states_image: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """`temb` `[B, T, C]`, `modulation` `[B, T, 6, C]`, text and image tokens; T = 1 for `timestep` `[B]`."""
        runs = 1 if timestep.ndim == 1 else timestep.shape[1]
        temb, modulation, text, image = self.condition_embedder(
            timestep.flatten(), encoder_hidden_states, encoder_hidden_states_image, timestep_seq_len=runs
        )
        return temb, modulation.unflatten(2, (6, -1)), text, image


class MLAWanTransformer3DModel(CausalWanTransformer3DModel):
    """Wan with latent self-attention; `mla` is an `MLAConfig` as a dict.

    A row of its `LatentCache` holds `kv_lora_rank` (+ `qk_rope_head_dim`) scalars instead of
    `2 * heads * head_dim`.
    """

    cache_class: type[FrameCache] = LatentCache

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        causal: dict[str, Any] | None = None,
        mla: dict[str, Any] | None = None,
    ) -> None:
        dense = {k: v for k, v in locals().items() if k not in ("self", "mla", "__class__")}
        if mla is None:
            raise ValueError("an MLA model needs the `mla` section of its config.json")
        self.mla = MLAConfig(**mla)
        if len(self.mla.kv_lora_rank) != num_layers:
            raise ValueError(f"the mla config has {len(self.mla.kv_lora_rank)} layers, the model {num_layers}")
        super().__init__(**dense)

    def make_attention(self, layer: int) -> CausalSelfAttention:
        heads, head_dim = self.config.num_attention_heads, self.config.attention_head_dim
        return LatentSelfAttention(heads * head_dim, heads, head_dim, self.config.eps, layer, self.mla)


def _geometry(config: Config) -> Geometry:
    return Geometry(config["num_layers"], config["num_attention_heads"], config["attention_head_dim"])


_OTHER_LAYOUT = "its configuration is in the Wan repository's layout; use the checkpoint in diffusers layout"

FAMILY = Family(
    name="wan",
    source_classes=("WanTransformer3DModel", "CausalWanTransformer3DModel"),
    dense_class=CausalWanTransformer3DModel,
    mla_class=MLAWanTransformer3DModel,
    geometry=_geometry,
    near_misses={
        "WanVACETransformer3DModel": "its control blocks are not part of the causal model",
        "WanAnimateTransformer3DModel": "its motion encoder and face adapter are not part of the causal model",
        "WanAnimate2Transformer3DModel": "its in-context reference blocks are not part of the causal model",
        "WanModel": _OTHER_LAYOUT,
        "CausalWanModel": _OTHER_LAYOUT,
    },
    stored_names=stored_names,
    infer_config=infer_config,
)
