"""Makes a Wan-like video transformer causal and streaming; the classes of all families share this code.

The dense form has the same parameter names as the stock model, so it loads a stock checkpoint unchanged. It is the
teacher, the baseline and the lossless reference. The latent form differs only in `attn1`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from ..errors import UserError
from ..flow import ALL_NOISE
from ..mla.attention import AttentionPass, CausalSelfAttention, DenseSelfAttention, clip_pass, stream_pass
from ..mla.bits import CacheBits, check_bits, is_mixed, row_bits
from ..mla.cache import DenseCache, FrameCache, LatentCache
from ..mla.config import MLAConfig, latent_groups
from ..mla.latent import LatentSelfAttention, whole_latent
from ..mla.quantized import Int8LatentCache, MixedLatentCache
from ..mla.rope import RotaryTable
from ..mla.window import CausalConfig
from .base import BlockInputs, ConditionKind, noise_channels
from .block import modulate
from .settings import StreamingSettings
from .shared import chunk_by_chunk


class CausalTransformer(StreamingSettings, nn.Module):
    """Mixin that comes before a stock model and adds block-causal self-attention and a streaming forward.

    `causal` is a `CausalConfig` as a dict; everything else is the stock configuration. A family implements
    `make_block`, `rotary_table` and `embed_conditions`. Conditions other than `timestep` and text are tensors with the
    batch first; `forward`, `forward_chunk` and `enter` pass them to `embed_conditions` by name. `condition_kinds`
    declares the conditions of a rollout. Those of kind `frames`, `[B, c, F, H, W]`, go to `patch` instead. With
    `flow_map`, the model predicts the mean velocity from `timestep` to a second time, the condition `r_timestep` of the
    same shape. `noise_range` are the noise levels that the model serves, narrower for one of several experts.
    """

    flow_map: ClassVar[bool] = False
    condition_kinds: ClassVar[Mapping[str, ConditionKind]] = {}
    noise_range: tuple[float, float] = ALL_NOISE
    cache_class: type[FrameCache] = DenseCache
    config: Any
    causal: CausalConfig
    dtype: torch.dtype
    device: torch.device
    blocks: Any
    rope: Any
    patch_embedding: Any
    condition_embedder: Any
    norm_out: Any
    proj_out: Any
    scale_shift_table: Any
    gradient_checkpointing: bool
    _gradient_checkpointing_func: Any

    def __init__(self, causal: dict[str, Any] | None, **stock: Any) -> None:
        super().__init__(**{**stock, "num_layers": 0})
        register: Any = self.register_to_config
        register(num_layers=stock["num_layers"])
        if stock["patch_size"][0] != 1:
            raise ValueError(f"temporal patches of {stock['patch_size'][0]} frames are not supported; they must be 1")
        self.causal = CausalConfig(**(self.default_causal() if causal is None else causal))
        self.blocks = nn.ModuleList(self.make_block() for _ in range(stock["num_layers"]))
        for layer, block in enumerate(self.blocks):
            block.attn1 = self.make_attention(layer)

    def default_causal(self) -> dict[str, Any]:
        """The `causal` section for a stock model, whose configuration has none."""
        return {}

    @property
    def noise_channels(self) -> int:
        """Channels of the latents that the model generates, and so of its noise."""
        return noise_channels(self.config)

    @property
    def needed_conditions(self) -> tuple[str, ...]:
        """The conditions that the model requires."""
        return ()

    def make_block(self) -> nn.Module:
        """A new block: the stock block with `CausalBlock` in front."""
        raise NotImplementedError

    def rotary_table(self) -> RotaryTable:
        """Rotations by index, on the model's device."""
        raise NotImplementedError

    def embed_conditions(
        self, timestep: Tensor, encoder_hidden_states: Tensor, encoder_hidden_states_image: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """`temb` `[B, T, C]`, `modulation` `[B, T, 6, C]`, text and image tokens; T = 1 for `timestep` `[B]`."""
        raise NotImplementedError

    def make_attention(self, layer: int) -> CausalSelfAttention:
        """A new self-attention for block `layer`."""
        heads, head_dim = self.config.num_attention_heads, self.config.attention_head_dim
        return DenseSelfAttention(heads * head_dim, heads, head_dim, self.config.eps, layer)

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens for a latent of `height x width`. Raises ValueError if it does not divide."""
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
        """An empty cache for latents of `height x width`; window and sinks default to the model's.

        Without `dtype`, the choice of `set_cache` applies, and by default the model's dtype. `torch.int8` quantizes the
        rows of a converted model. Raises ValueError for an unbounded window, and for int8 if the rows are not latents
        in a ring of frames.
        """
        changes = {"window_frames": window_frames, "sink_frames": sink_frames}
        settings = self.causal.model_dump() | {k: v for k, v in changes.items() if v is not None}
        causal, device = CausalConfig(**settings), device or self._execution_device()
        bits: CacheBits = self.cache_bits if dtype is None else "auto"
        if dtype == torch.int8:
            if not self.cache_class.fewer_bits:
                raise ValueError(f"{type(self).__name__} has no cache in int8; leave dtype out")
            bits = "int8"
        return self.make_cache(causal, batch_size, height, width, dtype or self.dtype, device, bits)

    def _execution_device(self) -> torch.device:
        """The device that computes; between calls, accelerate's offloading leaves the weights on `meta`."""
        if self.device.type != "meta":
            return self.device
        hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        return torch.device(next((device for device in devices if device is not None), self.device))

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
        """A cache with the arguments of `init_cache`, whose rows are in `dtype` where `bits` is `auto`.

        Raises ValueError for an unbounded window.
        """
        return self.cache_class(causal, self.row_widths, batch_size, *self.token_grid(height, width), dtype, device)

    @property
    def row_widths(self) -> list[int]:
        """Cached scalars per token of each layer, in this process."""
        processes = 1 if self.parallel is None else self.parallel.size()
        return [x.row_width if x.rank else x.row_width // processes for x in (block.attn1 for block in self.blocks)]

    def far_history(self, height: int, width: int) -> dict[str, int]:
        """`near_frames` and `far_tokens_per_frame` for latents of `height x width`; empty if all history is in full."""
        return {}

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
        **conditions: Any,
    ) -> Any:
        """Block-causal velocity `[B, C, F, H, W]` of a whole clip.

        `hidden_states` is `[B, C, F, H, W]`. `timestep` is `[B]`, `[B, F]` or `[B, S]` (one per token).
        `encoder_hidden_states` is `[B, L, text_dim]`.

        With `context` `[B', C, F, H, W]`, B a multiple of B', every chunk sees the history in `context` instead of its
        own noisy history (teacher forcing): item i reads context item i mod B'. `context_timestep` `[B']` or `[B', F]`
        is its noise level, by default 0.

        With `cache`, this calls `forward_chunk`, so that the hooks of offloading run. The `scale` in
        `attention_kwargs` applies to LoRA layers.
        """
        if cache is not None:
            conditions["encoder_hidden_states_image"] = encoder_hidden_states_image
            return self.forward_chunk(hidden_states, timestep, encoder_hidden_states, cache, write=write, **conditions)
        sample = self.through_blocks(
            self.enter(
                hidden_states,
                timestep,
                encoder_hidden_states,
                encoder_hidden_states_image,
                context=context,
                context_timestep=context_timestep,
                **conditions,
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
        **conditions: Any,
    ) -> Tensor:
        """Velocity `[B, C, F, H, W]` of the next F frames of a rollout.

        With `write`, the chunk's rows are cached and the rollout advances by F frames.
        """
        self.check_chunk(hidden_states, cache)
        frames = hidden_states.shape[2]
        step = stream_pass(self.rotary_table, cache, frames, write)
        by_frames, fixed = self.split_conditions(conditions)
        embedded = self.embed_conditions(timestep, encoder_hidden_states, encoder_hidden_states_image, **fixed)
        # No variable holds the tokens, so they are freed while the blocks run.
        sample = self.through_blocks(
            block_inputs(self.patch(hidden_states, **by_frames), embedded, step, hidden_states)
        )
        if write:
            cache.frames_seen += frames
        return sample

    def check_chunk(self, hidden_states: Tensor, cache: FrameCache) -> None:
        """Raise ValueError when a chunk `[B, C, F, H, W]` does not fit the cache."""
        if hidden_states.shape[0] != cache.batch_size:
            raise ValueError(f"the cache holds {cache.batch_size} items, hidden_states has {hidden_states.shape[0]}")
        rows, columns = self.token_grid(*hidden_states.shape[3:])
        if (rows, columns) != (cache.height, cache.width):
            raise ValueError(
                f"the cache is for {cache.height}x{cache.width} tokens per frame, hidden_states has {rows}x{columns}"
            )
        if not self.blocks[0].attn1.rank and cache.rows[0].shape[-1] != self.row_widths[0]:
            raise ValueError("the cache was made for another number of processes; make it after set_parallel")

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

        With `context`, its B' items come first in the batch of all returned tensors.
        """
        context_batch = None
        if context is not None:
            context_timestep = check_context(hidden_states, timestep, context, context_timestep)
            context_batch = len(context)
            hidden_states = torch.cat([context.to(hidden_states.dtype), hidden_states])
            timestep = torch.cat([context_timestep.to(timestep.dtype), timestep])
            encoder_hidden_states = torch.cat([encoder_hidden_states[:context_batch], encoder_hidden_states])
            if encoder_hidden_states_image is not None:
                encoder_hidden_states_image = torch.cat(
                    [encoder_hidden_states_image[:context_batch], encoder_hidden_states_image]
                )
            own = {name: value[:context_batch] for name, value in conditions.items()}
            if self.flow_map:
                # Passes that write to a cache have r = t.
                own["r_timestep"] = context_timestep.to(timestep.dtype)
            conditions = {name: torch.cat([own[name], value]) for name, value in conditions.items()}
        frames, height, width = hidden_states.shape[2:]
        grid = self.token_grid(height, width)
        table = self.rotary_table().to(hidden_states.device)
        step = clip_pass(table, self.causal, frames, *grid, context_batch=context_batch)
        by_frames, fixed = self.split_conditions(conditions)
        embedded = self.embed_conditions(timestep, encoder_hidden_states, encoder_hidden_states_image, **fixed)
        return block_inputs(self.patch(hidden_states, **by_frames), embedded, step, hidden_states)

    def leave(self, tokens: Tensor, inputs: BlockInputs) -> Tensor:
        """Velocity `[B, C, F, H, W]` from the last block's `tokens` `[B' + B, S, C]`, without the context."""
        frames, height, width = inputs.size
        rows, columns = self.token_grid(height, width)
        tokens = tokens[:, -frames * rows * columns :]
        shift, scale = (self.scale_shift_table.unsqueeze(1) + inputs.temb.unsqueeze(2)).unbind(2)
        tokens = modulate(self.norm_out(tokens.float()), scale, shift).to(tokens.dtype)
        _, p_h, p_w = self.config.patch_size
        patches = inputs.step.gathered(self.proj_out(tokens))
        patches = patches.reshape(-1, frames, rows, columns, p_h, p_w, self.noise_channels)
        sample = patches.permute(0, 6, 1, 2, 4, 3, 5).reshape(-1, self.noise_channels, frames, height, width)
        return sample[inputs.step.context_batch or 0 :]

    def split_conditions(self, conditions: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Split conditions into those of kind `frames`, for `patch`, and the others, for `embed_conditions`."""
        by_frames = {name: x for name, x in conditions.items() if self.condition_kinds.get(name) == "frames"}
        return by_frames, {name: x for name, x in conditions.items() if name not in by_frames}

    def patch(self, hidden_states: Tensor) -> Tensor:
        """Tokens `[B, S, C]` of a latent `[B, C, F, H, W]`; a family adds its conditions of kind `frames`."""
        tokens: Tensor = self.patch_embedding(hidden_states)
        return tokens.flatten(2).transpose(1, 2).contiguous()

    @property
    def latent_groups(self) -> list[range]:
        """The layers that share each latent; in a dense model, every layer is a group of its own."""
        return latent_groups(len(self.blocks))

    def through_blocks(self, inputs: BlockInputs, leave: bool = True) -> Tensor:
        """Run the blocks and return the velocity, or without `leave` the last block's tokens `[B, S, C]`.

        Processes that share a chunk each run their own tokens, and have the same velocity.
        """
        if inputs.step.cache is not None:
            inputs.step.kernels = self.kernels
            if self.parallel is not None:
                inputs = inputs.shared_by(self.parallel)
        tokens = inputs.tokens
        # Free the first block's input while the others run.
        inputs = inputs._replace(tokens=tokens.new_empty(0))
        for layers in self.latent_groups:
            blocks: list[Any] = [self.blocks[layer] for layer in layers]
            if len(blocks) > 1 and inputs.step.cache is None:
                tokens = chunk_by_chunk(blocks, tokens, inputs, self._run_part)
                continue
            parts: list[Tensor] = []
            for block in blocks:
                step = inputs.step.of(block.attn1, tokens)
                tokens = self._run_part(block, tokens, inputs.text, inputs.modulation, step)
                if step.part is not None and step.part.rows is not None:
                    parts.append(step.part.rows)
            if parts:
                # The sum is in float32 and is rounded or quantized once.
                step.keep(step.gathered(whole_latent(parts)))
        return self.leave(tokens, inputs) if leave else tokens

    def _run_part(self, part: Callable[..., Any], *args: Any) -> Any:
        """Call one or several blocks; with gradient checkpointing, a backward pass recomputes them."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(part, *args)
        return part(*args)


def block_inputs(
    tokens: Tensor,
    embedded: tuple[Tensor, Tensor, Tensor, Tensor | None],
    step: AttentionPass,
    hidden_states: Tensor,
) -> BlockInputs:
    """The inputs of the blocks from `tokens` of a latent `hidden_states` and the result of `embed_conditions`."""
    frames, height, width = hidden_states.shape[2:]
    temb, modulation, text, image = embedded
    if image is not None:
        text = torch.cat([image, text], dim=1)
    return BlockInputs(tokens, text, modulation, step, temb, (frames, height, width))


def check_context(hidden_states: Tensor, timestep: Tensor, context: Tensor, context_timestep: Tensor | None) -> Tensor:
    """The noise level of `context` in the shape of `timestep`. Raises ValueError when the shapes do not fit."""
    batch = len(context)
    if len(hidden_states) % batch or context.shape[1:] != hidden_states.shape[1:]:
        raise ValueError(
            f"context of shape {tuple(context.shape)} does not fit hidden_states {tuple(hidden_states.shape)}"
        )
    if context_timestep is None:
        return timestep.new_zeros((batch, *timestep.shape[1:]))
    if context_timestep.ndim < timestep.ndim:
        return context_timestep.unsqueeze(1).expand(-1, timestep.shape[1])
    return context_timestep


class LatentTransformer(CausalTransformer):
    """Mixin that comes before a dense causal class and adds latent self-attention; `mla` is an `MLAConfig` as a dict.

    A row of its cache holds `kv_lora_rank` (+ `qk_rope_head_dim`) scalars instead of `2 * heads * head_dim`.
    """

    cache_class: type[FrameCache] = LatentCache

    def __init__(self, mla: dict[str, Any] | None, **dense: Any) -> None:
        if mla is None:
            raise ValueError("an MLA model needs the `mla` section of its config.json")
        config = MLAConfig(**mla)
        if len(config.kv_lora_rank) != dense["num_layers"]:
            raise ValueError(
                f"the mla section has {len(config.kv_lora_rank)} layers, but the model has {dense['num_layers']}"
            )
        self.mla = config
        super().__init__(**dense)

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
        if bits == "auto":
            return super().make_cache(causal, batch_size, height, width, dtype, device)
        grid = self.token_grid(height, width)
        if is_mixed(bits):
            rows = [row_bits(bits, *self.mla.row_parts(layer)) for layer in range(len(self.blocks))]
            return MixedLatentCache(causal, rows, batch_size, *grid, device)
        return Int8LatentCache(causal, self.row_widths, batch_size, *grid, dtype, device)

    def set_cache(self, cache: CacheBits) -> None:
        if not self.cache_class.fewer_bits:
            super().set_cache(cache)
        self.cache_bits = check_bits(cache)

    @property
    def latent_groups(self) -> list[range]:
        return self.mla.latent_groups()

    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> None:
        """Load a LoRA; see diffusers. Raises UserError for weights, not a path, of a query that `q_lora_rank` split."""
        given = pretrained_model_name_or_path_or_dict
        if self.mla.q_lora_rank and isinstance(given, Mapping) and any(".attn1.to_q." in name for name in given):
            raise UserError(
                "this LoRA changes attn1.to_q, which q_lora_rank replaced in this model; remove those weights, or add "
                "the LoRA before the conversion (source.adapters)"
            )
        stock: Any = super()
        stock.load_lora_adapter(given, *args, **kwargs)

    def make_attention(self, layer: int) -> CausalSelfAttention:
        heads, head_dim = self.config.num_attention_heads, self.config.attention_head_dim
        return LatentSelfAttention(heads * head_dim, heads, head_dim, self.config.eps, layer, self.mla)
