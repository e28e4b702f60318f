"""Replaces `WanDiffusionWrapper` with a model of this package, in inference code derived from Self-Forcing's.

Such pipelines own the loop over chunks and steps and call `generator(...)`, which fills dense caches that the pipeline
has allocated (Self-Forcing, arXiv 2506.08009, `pipeline/causal_inference.py`, `utils/wan_wrapper.py`). Here these calls
go to `forward_chunk`, which uses the model's own cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..devices import widest
from ..families.causal import CausalTransformer
from ..flow import NUM_TRAIN_TIMESTEPS, add_noise, shift_time, to_clean
from ..mla.cache import FrameCache
from ..mla.graph import denoiser
from ..mla.window import CausalConfig

KV_CACHES = ("kv_cache1", "kv_cache_pos", "kv_cache_neg")
CROSS_CACHES = ("crossattn_cache", "crossattn_cache_pos", "crossattn_cache_neg")


class SelfForcingGenerator(nn.Module):
    """The `generator` of such a pipeline, for a causal `model`, dense or converted.

        generator = SelfForcingGenerator(model, timestep_shift=5.0)
        pipeline = CausalInferencePipeline(config, device=device, generator=generator)
        generator.attach(pipeline)

    A pass whose timesteps are at most `context_timestep`, the pipeline's `context_noise`, writes the chunk to the
    cache. Other passes only read the cache, so they replay from a CUDA graph where the model supports it. A model
    without `set_kernels` uses kernels and graphs where they support it. Every cache of the pipeline has a counterpart
    here, also the two of classifier-free guidance. Chunks, window, sinks and positions are those of `model.causal`.
    `timestep_shift` is that of the scheduler from `get_scheduler`.

    Moving the generator moves the model. Casting it does not change the model's dtypes, because norms and time
    embeddings must stay float32.
    """

    def __init__(self, model: CausalTransformer, timestep_shift: float = 5.0, context_timestep: float = 0.0) -> None:
        super().__init__()
        if model.kernels is None:
            model.set_kernels("auto")
        self.transformer = model
        self.model = Settings(model.causal)
        self.context_timestep = context_timestep
        self._scheduler = FlowScheduler(timestep_shift)
        # Keyed by the id of the pipeline's cache, which is kept alive so that no other object gets that id.
        self._streams: dict[int, tuple[Any, _Stream]] = {}

    def get_scheduler(self) -> FlowScheduler:
        return self._scheduler

    def attach(self, pipeline: Any) -> None:
        """Make `pipeline` allocate no tensors: its caches then hold only the counters and flags that it uses."""
        # Pipelines reset as many blocks as they assume the model to have.
        blocks = max(len(self.transformer.blocks), getattr(pipeline, "num_transformer_blocks", 0))

        def initialize(names: tuple[str, ...], block: dict[str, Any]) -> Callable[..., None]:
            def allocate(batch_size: int, dtype: torch.dtype, device: Any) -> None:
                for name in names:
                    self._streams.pop(id(getattr(pipeline, name, None)), None)
                    setattr(pipeline, name, [dict(block) for _ in range(blocks)])

            return allocate

        pipeline._initialize_kv_cache = initialize(KV_CACHES, {"global_end_index": 0, "local_end_index": 0})
        pipeline._initialize_crossattn_cache = initialize(CROSS_CACHES, {"is_init": False})

    @torch.no_grad()
    def forward(
        self,
        noisy_image_or_video: Tensor,
        conditional_dict: Mapping[str, Tensor],
        timestep: Tensor,
        kv_cache: Any = None,
        crossattn_cache: Any = None,
        current_start: int = 0,
        cache_start: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Velocity and clean chunk `[B, F, C, H, W]`, in the dtype of the input chunk.

        `noisy_image_or_video` is `[B, F, C, H, W]` at `timestep` `[B, F]` in [0, 1000]. `conditional_dict` holds
        `prompt_embeds` `[B, L, D]`. `current_start` is the number of tokens before the chunk. `kv_cache` identifies the
        stream but is not read; `crossattn_cache` and `cache_start` are ignored. A chunk at 0 begins a new video. A
        chunk before the end of the cached frames overwrites them. Raises ValueError if a chunk was skipped, if it is
        not one of the model's chunks, and without a cache.
        """
        if kv_cache is None:
            raise ValueError("this generator needs a kv_cache; for a whole clip without a cache, call the model itself")
        x = noisy_image_or_video.transpose(1, 2)
        stream = self._stream(kv_cache, x)
        stream.go_to(current_start, x.shape[2])
        text = conditional_dict["prompt_embeds"].to(self.transformer.dtype)
        hidden_states = x.to(self.transformer.dtype)
        if bool((timestep <= self.context_timestep).all()):
            v = self.transformer(hidden_states, timestep, text, cache=stream.cache, write=True)
        else:
            # The next replay overwrites the result of this one.
            v = stream.denoise(hidden_states, timestep, text).clone()
        wide = widest(x.device)
        clean = to_clean(x.to(wide), v.to(wide), timestep.to(wide) / NUM_TRAIN_TIMESTEPS)
        return v.transpose(1, 2).to(x.dtype), clean.transpose(1, 2).to(x.dtype)

    def _stream(self, kv_cache: Any, x: Tensor) -> _Stream:
        """Our stream for the pipeline's `kv_cache`; a new one if `x` `[B, C, F, H, W]` has another size."""
        size = (len(x), *x.shape[3:])
        _, stream = self._streams.get(id(kv_cache), (None, None))
        if stream is None or stream.size != size:
            stream = _Stream(self.transformer, size)
            self._streams[id(kv_cache)] = (kv_cache, stream)
        return stream

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SelfForcingGenerator:
        self.transformer.to(fn(torch.empty(0, device=self.transformer.device)).device)
        return self


class Settings:
    """The attributes that pipelines read and set on `generator.model`. Setting another chunk size raises ValueError."""

    def __init__(self, causal: CausalConfig) -> None:
        self._causal = causal

    @property
    def local_attn_size(self) -> int:
        """Frames of the window; -1 for an unbounded one."""
        return self._causal.window_frames or -1

    @property
    def num_frame_per_block(self) -> int:
        return self._causal.num_frames_per_block

    @num_frame_per_block.setter
    def num_frame_per_block(self, frames: int) -> None:
        if frames != self._causal.num_frames_per_block:
            raise ValueError(
                f"the pipeline makes chunks of {frames} frames, the model of {self._causal.num_frames_per_block}; "
                f"set the pipeline's num_frame_per_block to {self._causal.num_frames_per_block}"
            )


class FlowScheduler:
    """The scheduler of such a pipeline: decreasing `timesteps` `[1000]`, warped by `shift`, and noise for them."""

    def __init__(self, shift: float) -> None:
        levels = torch.linspace(1, 0, NUM_TRAIN_TIMESTEPS + 1)[:-1]
        self.sigmas = shift_time(levels, shift)
        self.timesteps = self.sigmas * NUM_TRAIN_TIMESTEPS

    def add_noise(self, original_samples: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """`original_samples` `[N, C, H, W]` with `noise` at the levels nearest to `timestep` `[N]`."""
        timesteps = self.timesteps.to(timestep.device)
        nearest = (timesteps - timestep.flatten().unsqueeze(1)).abs().argmin(dim=1)
        sigma = self.sigmas.to(noise.device)[nearest.to(noise.device)]
        return add_noise(original_samples, noise, sigma).type_as(noise)


@dataclass
class _Stream:
    """A cache of the model and the passes over it, for latents of `size` (B, H, W)."""

    model: CausalTransformer
    size: tuple[int, ...]

    def __post_init__(self) -> None:
        batch, height, width = self.size
        self.cache: FrameCache = self.model.init_cache(batch, height, width)
        self.denoise = denoiser(self.model, self.cache)

    def go_to(self, current_start: int, frames: int) -> None:
        """Make the chunk of `frames` frames that follows `current_start` tokens the next one. Raises ValueError."""
        cache = self.cache
        tokens = cache.height * cache.width
        frame, rest = divmod(int(current_start), tokens)
        if rest:
            raise ValueError(
                f"current_start {current_start} is not a multiple of the {tokens} tokens per frame; "
                f"set the pipeline's frame_seq_length to {tokens}"
            )
        expected = cache.causal.chunk_end(frame) - frame
        if frames != expected:
            raise ValueError(f"got a chunk of {frames} frames at frame {frame}, where the model expects {expected}")
        if frame > cache.frames_seen:
            raise ValueError(
                f"the chunk at frame {frame} follows one that was not cached, at frame {cache.frames_seen}; "
                "set context_timestep to the timestep of the pass over finished chunks"
            )
        if frame == cache.frames_seen:
            return
        if frame == 0:
            cache.reset()
        elif cache.is_ring:
            cache.rewind(frame)
        else:
            raise ValueError(f"a {type(cache).__name__} cannot go back to frame {frame}")
