"""Defines AnyFlow-FAR as a causal, streaming transformer: coarse patches for far history, two timesteps.

Stock inference encodes the whole video again after every chunk. Compressed frames do not depend on later ones, so here
only the near chunks and the chunk that has just become far are encoded (AnyFlow, arXiv 2605.13724; FAR,
arXiv 2503.19325). Results equal the stock pipeline's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import AnyFlowFARTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_anyflow_far import AnyFlowFARTransformerOutput, AnyFlowTransformerBlock
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from ..errors import UserError
from ..mla.bits import CacheBits
from ..mla.cache import FrameCache
from ..mla.rope import RotaryTable, split_rotary_table
from ..mla.window import CausalConfig, Chunk
from .base import BlockInputs, Config, Family, Shapes
from .block import CausalBlock
from .causal import CausalTransformer, LatentTransformer, block_inputs, check_context
from .far import FarCache, FarGrid, FarWindow, clip_layout, compressed_table, denoise_pass, encode_pass
from .signature import takes

CACHE, PARTITION = "latent_cache", "chunk_partition"

# The class name in the authors' repository (NVlabs/AnyFlow), and its keys that diffusers' class lacks.
ORIGINAL_CLASS = "FAR_Wan_Transformer3DModel"
_ORIGINAL_KEYS = ("init_far_model", "init_flowmap_model", "qk_norm", "added_kv_proj_dim")
_QK_NORM = "rms_norm_across_heads"


def stock_config(stored: Config, shapes: Shapes) -> dict[str, Any] | None:
    """Stock configuration for that of `ORIGINAL_CLASS`, whose other keys and tensors equal those of diffusers' class.

    None for any other class. Raises UserError for a model that is not causal, has no flow map or does not define its
    chunks, and for layers that diffusers' class does not have.
    """
    if stored.get("_class_name") != ORIGINAL_CLASS:
        return None
    if not stored.get("init_far_model"):
        raise UserError(
            f"{ORIGINAL_CLASS} without init_far_model cannot be converted: it is bidirectional and has no cache; use "
            "AnyFlow-FAR, its causal form"
        )
    if not stored.get("init_flowmap_model"):
        raise UserError(
            f"{ORIGINAL_CLASS} without init_flowmap_model cannot be converted: it is not distilled to a flow map; use "
            "a published AnyFlow-FAR checkpoint"
        )
    if stored.get("qk_norm", _QK_NORM) != _QK_NORM or stored.get("added_kv_proj_dim") is not None:
        raise UserError(
            f"{ORIGINAL_CLASS} cannot be converted with a qk_norm other than {_QK_NORM} or with added_kv_proj_dim, "
            "which diffusers' class lacks; use a published AnyFlow-FAR checkpoint"
        )
    if not stored.get(PARTITION):
        raise UserError(
            f"the configuration of {ORIGINAL_CLASS} has no {PARTITION}; add the chunks of its training, which are "
            "[1, 3, 3, 3, 3, 3, 3, 2] for the published models"
        )
    # The only default that differs: diffusers' is 0.25.
    return {"gate_value": 0} | {key: value for key, value in stored.items() if key not in _ORIGINAL_KEYS}


class CausalAnyFlowBlock(CausalBlock, AnyFlowTransformerBlock):
    """An AnyFlow block with our self-attention."""


class CausalAnyFlowFARTransformer3DModel(CausalTransformer, AnyFlowFARTransformer3DModel):
    """`AnyFlowFARTransformer3DModel` with our self-attention and a cache that is written chunk by chunk.

    It predicts the mean velocity from `timestep` to `r_timestep` (by default `timestep`). `causal` defaults to the
    chunks of `chunk_partition` and a window of all its frames. When called with `chunk_partition`, it accepts the
    arguments that `AnyFlowFARPipeline` passes to the stock model, including the layout `[B, F, C, H, W]`.
    """

    flow_map = True
    cache_class: type[FrameCache] = FarCache
    far_patch_embedding: Any
    _no_split_modules = ["CausalAnyFlowBlock"]
    _repeated_blocks = ["CausalAnyFlowBlock"]

    @register_to_config
    @takes(AnyFlowFARTransformer3DModel, causal=None)
    def __init__(self, **config: Any) -> None:
        if config["full_chunk_limit"] < 2:
            raise ValueError("full_chunk_limit must be at least 2: one full chunk of history and the current one")
        coarse, fine = config["compressed_patch_size"], config["patch_size"]
        if any(c % f for c, f in zip(coarse, fine, strict=True)) or coarse[0] != fine[0]:
            raise ValueError(f"compressed patches of {coarse} are not spatial multiples of patches of {fine}")
        super().__init__(**config)
        causal = self.causal
        needed = causal.sink_frames + config["full_chunk_limit"] * causal.num_frames_per_block + 1
        if causal.window_frames is not None and causal.window_frames < needed:
            raise ValueError(
                f"causal.window_frames={causal.window_frames} cannot hold sink_frames={causal.sink_frames}, "
                f"full_chunk_limit={config['full_chunk_limit']} chunks of {causal.num_frames_per_block} frames "
                f"and a compressed frame; {needed} can"
            )

    def default_causal(self) -> dict[str, Any]:
        partition = list(self.config.chunk_partition)
        longest = max(partition)
        return {
            "num_frames_per_block": longest,
            "window_frames": sum(partition),
            "independent_first_frame": partition[0] == 1 < longest,
        }

    def make_block(self) -> nn.Module:
        config = self.config
        heads = config.num_attention_heads
        return CausalAnyFlowBlock(
            heads * config.attention_head_dim, config.ffn_dim, heads, config.cross_attn_norm, config.eps
        )

    def rotary_table(self) -> RotaryTable:
        head_dim = self.config.attention_head_dim
        # The stock table is not a buffer but is built on the device in complex128, which MPS lacks.
        cis = self.rope._build_freqs(torch.device("cpu")).to(self.device, torch.complex64)
        return split_rotary_table(cis, head_dim)

    @property
    def far_window(self) -> FarWindow:
        return FarWindow(self.causal, self.config.full_chunk_limit)

    def far_grid(self, height: int, width: int) -> FarGrid:
        """Token grids and rotations for latents of `height x width`. Raises ValueError if a latent is too small."""
        _, c_h, c_w = self.config.compressed_patch_size
        if height < c_h or width < c_w:
            raise ValueError(f"a latent of {height}x{width} is smaller than a compressed patch of {c_h}x{c_w}")
        table, size = self.rotary_table(), self.token_grid(height, width)
        ratio = [c // f for c, f in zip(self.config.compressed_patch_size, self.config.patch_size, strict=True)]
        coarse = compressed_table(table, (ratio[0], ratio[1], ratio[2]))
        return FarGrid(table, coarse, size, (height // c_h, width // c_w))

    def far_history(self, height: int, width: int) -> dict[str, int]:
        near = (self.config.full_chunk_limit - 1) * self.causal.num_frames_per_block
        return {"near_frames": near, "far_tokens_per_frame": self.far_grid(height, width).compressed_tokens}

    def make_cache(
        self,
        causal: CausalConfig,
        batch_size: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
        bits: CacheBits = "auto",
    ) -> FrameCache:
        window = FarWindow(causal, self.config.full_chunk_limit)
        if causal.window_frames is None:
            raise ValueError("a streaming cache needs a finite window; set window_frames")
        block = causal.num_frames_per_block
        # The current chunk and the one before it may each be the last of a video, with a single frame.
        far = causal.window_frames - 2 - (window.limit - 2) * block
        frames = (max(0, far), (window.limit - 1) * block)
        return FarCache(window, self.row_widths, batch_size, self.far_grid(height, width), frames, dtype, device)

    @apply_lora_scale("attention_kwargs")
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
        cache: FrameCache | None = None,
        write: bool = False,
        chunk_partition: list[int] | None = None,
        kv_cache: dict[Any, Any] | None = None,
        kv_cache_flag: dict[str, Any] | None = None,
        attention_mask: Any = None,
        **conditions: Any,
    ) -> Any:
        """Block-causal velocity of a clip, as in `CausalTransformer.forward`; `r_timestep` is a condition.

        With `chunk_partition`, this is a step of `AnyFlowFARPipeline`. The content of the dict `kv_cache`, or of the
        entry of that name in `attention_kwargs`, is then replaced by our cache.
        """
        if chunk_partition is None:
            return super().forward(
                hidden_states,
                timestep,
                encoder_hidden_states,
                encoder_hidden_states_image,
                return_dict,
                context=context,
                context_timestep=context_timestep,
                cache=cache,
                write=write,
                **conditions,
            )
        holder = (attention_kwargs or {}).get("kv_cache") if kv_cache is None else kv_cache
        if holder is None:
            raise ValueError("chunk_partition without kv_cache is the stock training forward; call without it")
        latents = hidden_states.transpose(1, 2)
        held = self._pipeline_cache(holder, latents, list(chunk_partition))
        text = (encoder_hidden_states, encoder_hidden_states_image)
        sample = None
        if (kv_cache_flag or {}).get("is_cache_step"):
            for stage in range(len(held.bounds), len(chunk_partition)):
                start = sum(chunk_partition[:stage])
                stop = start + chunk_partition[stage]
                self._encode_next(latents[:, :, start:stop], timestep[:, start:stop], text, held)
        else:
            sample = self.forward_chunk(
                latents, timestep, text[0], held, encoder_hidden_states_image=text[1], **conditions
            ).transpose(1, 2)
        return AnyFlowFARTransformerOutput(sample, holder) if return_dict else (sample, holder)

    def forward_chunk(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        cache: FrameCache,
        write: bool = False,
        encoder_hidden_states_image: Tensor | None = None,
        **conditions: Any,
    ) -> Tensor:
        """Velocity `[B, C, F, H, W]` of the next F frames of a rollout.

        With `write`, the chunk is encoded together with the earlier chunks that are still near. The velocity is that of
        the encoding pass, and `r_timestep` is `timestep`.
        """
        self.check_chunk(hidden_states, cache)
        assert isinstance(cache, FarCache)
        text = (encoder_hidden_states, encoder_hidden_states_image)
        if write:
            return self._encode_next(hidden_states, timestep, text, cache)
        step = denoise_pass(cache, hidden_states.shape[2])
        embedded = self.embed_conditions(timestep, *text, **conditions)
        return self.through_blocks(block_inputs(self.patch(hidden_states), embedded, step, hidden_states))

    def enter(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        context: Tensor | None = None,
        context_timestep: Tensor | None = None,
        **conditions: Any,
    ) -> BlockInputs:
        """The inputs of the blocks for a whole clip; the arguments are those of `forward`.

        History is packed in the sequence, not in the batch, because a chunk is seen in up to `full_chunk_limit` forms.
        That adds about two tokens per token of the clip.
        """
        frames, height, width = hidden_states.shape[2:]
        if timestep.ndim == 1:
            timestep = timestep.unsqueeze(1).expand(-1, frames)
        past, past_timestep = hidden_states, timestep
        if context is not None:
            past_timestep = check_context(hidden_states, timestep, context, context_timestep)
            copies = len(hidden_states) // len(context)
            past = context.to(hidden_states.dtype).repeat(copies, 1, 1, 1, 1)
            past_timestep = past_timestep.to(timestep.dtype).repeat(copies, 1)
        grid = self.far_grid(height, width)
        clip = clip_layout(self.far_window, grid, frames)
        tokens = [self.patch(hidden_states)]
        if clip.near:
            tokens.insert(0, self.patch(past[:, :, clip.near]))
        if clip.far:
            tokens.insert(0, self.patch_compressed(past[:, :, clip.far]))
        text = (encoder_hidden_states, encoder_hidden_states_image)
        embedded = self.embed_conditions(timestep, *text, **conditions)
        _, past_modulation, _, _ = self.embed_conditions(past_timestep, *text)
        # Runs of tokens must have one length, which has to divide both kinds of frames.
        run = math.gcd(grid.full_tokens, grid.compressed_tokens)
        modulation = torch.cat(
            [
                past_modulation[:, clip.far].repeat_interleave(grid.compressed_tokens // run, dim=1),
                past_modulation[:, clip.near].repeat_interleave(grid.full_tokens // run, dim=1),
                embedded[1].repeat_interleave(grid.full_tokens // run, dim=1),
            ],
            dim=1,
        )
        inputs = block_inputs(torch.cat(tokens, dim=1), embedded, clip.step, hidden_states)
        return inputs._replace(modulation=modulation)

    def embed_conditions(
        self,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None,
        r_timestep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if timestep.ndim == 1:
            timestep = timestep.unsqueeze(1)
        target = timestep if r_timestep is None else r_timestep.reshape(timestep.shape)
        # A call, and not of its parts, so that offloading moves the embedder's own buffer too.
        temb, modulation, text, image = self.condition_embedder(
            timestep,
            target,
            encoder_hidden_states,
            encoder_hidden_states_image,
            {"num_full_frames": timestep.shape[1], "full_token_per_frame": 1, "compressed_token_per_frame": 1},
        )
        return temb, modulation.unflatten(2, (6, -1)), text, image

    def patch_compressed(self, hidden_states: Tensor) -> Tensor:
        """Coarse tokens `[B, S, C]` of a latent `[B, C, F, H, W]`."""
        tokens: Tensor = self.far_patch_embedding(hidden_states)
        return tokens.flatten(2).transpose(1, 2).contiguous()

    def _encode_next(
        self, latents: Tensor, timestep: Tensor, text: tuple[Tensor, Tensor | None], cache: FarCache
    ) -> Tensor:
        """Write the next chunk and encode the near ones again; returns the next chunk's velocity."""
        start = cache.frames_seen
        stop = start + latents.shape[2]
        before = cache.bounds, cache.recent
        cache.bounds = [*cache.bounds, Chunk(start, stop)]
        cache.recent = [*cache.recent, (latents, timestep)][-cache.window.limit :]
        try:
            velocity = self._encode_stage(text, cache)
        except BaseException:
            # Restore the state, so that the caller can retry after running out of memory.
            cache.bounds, cache.recent = before
            raise
        cache.frames_seen = stop
        return velocity

    def _encode_stage(self, text: tuple[Tensor, Tensor | None], cache: FarCache) -> Tensor:
        """Write the last chunk of the cache's `recent` and those that change with it; returns its velocity."""
        stage = len(cache.bounds) - 1
        oldest = stage - len(cache.recent) + 1
        demoted = cache.window.demoted(stage)
        if demoted is not None:
            self._encode(stage, demoted, cache.recent[demoted - oldest], text, cache, compressed=True)
        for chunk in cache.window.kept(stage):
            velocity = self._encode(stage, chunk, cache.recent[chunk - oldest], text, cache, compressed=False)
        return velocity

    def _encode(
        self,
        stage: int,
        chunk: int,
        recent: tuple[Tensor, Tensor],
        text: tuple[Tensor, Tensor | None],
        cache: FarCache,
        compressed: bool,
    ) -> Tensor:
        latents, timestep = recent
        step = encode_pass(cache, stage, chunk, compressed)
        tokens = self.patch_compressed(latents) if compressed else self.patch(latents)
        embedded = self.embed_conditions(timestep, *text)
        return self.through_blocks(block_inputs(tokens, embedded, step, latents), leave=not compressed)

    def _pipeline_cache(self, holder: dict[Any, Any], latents: Tensor, partition: list[int]) -> FarCache:
        """Our cache in the pipeline's `kv_cache`; the first call puts it in place of the dense tensors."""
        cache = holder.get(CACHE)
        if isinstance(cache, FarCache):
            return cache
        grid, limit = self.far_grid(*latents.shape[3:]), self.config.full_chunk_limit
        if PARTITION in holder:
            whole = holder[PARTITION]
            frames = (sum(whole[: max(0, len(whole) - limit)]), (limit - 1) * max(whole))
        else:
            full, coarse = holder[0]["full_cache"].shape[3], holder[0]["compressed_cache"].shape[3]
            frames = (coarse // grid.compressed_tokens, full // grid.full_tokens // limit * (limit - 1))
        # In the stock pipeline every chunk sees the whole video.
        causal = CausalConfig(num_frames_per_block=max(partition), window_frames=None)
        holder.clear()
        cache = FarCache(
            FarWindow(causal, limit), self.row_widths, len(latents), grid, frames, latents.dtype, latents.device
        )
        holder[CACHE] = cache
        return cache


class MLAAnyFlowFARTransformer3DModel(LatentTransformer, CausalAnyFlowFARTransformer3DModel):
    """AnyFlow-FAR with latent self-attention; the latents of full and of compressed frames are cached."""

    cache_class: type[FrameCache] = FarCache

    @register_to_config
    @takes(CausalAnyFlowFARTransformer3DModel, mla=None)
    def __init__(self, **config: Any) -> None:
        super().__init__(**config)


FAMILY = Family(
    name="anyflow_far",
    source_classes=("AnyFlowFARTransformer3DModel", "CausalAnyFlowFARTransformer3DModel"),
    dense_class=CausalAnyFlowFARTransformer3DModel,
    mla_class=MLAAnyFlowFARTransformer3DModel,
    foreign_classes=(ORIGINAL_CLASS,),
    near_misses={
        "AnyFlowTransformer3DModel": "it is bidirectional and has no cache; use AnyFlow-FAR, its causal form",
    },
    stock_config=stock_config,
)
