"""A model of ours in the place of `WanDiffusionWrapper`, in inference code that descends from Self-Forcing's.

Such pipelines own the loop over chunks and steps and call `generator(...)`, which fills dense caches that the
pipeline has allocated (Self-Forcing, arXiv 2506.08009, `pipeline/causal_inference.py`, `utils/wan_wrapper.py`).
Here the calls go to `forward_chunk`, and what is cached lies in the model's own cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..flow import NUM_TRAIN_TIMESTEPS, add_noise, shift_time, to_clean
from ..mla.cache import FrameCache
from ..mla.graph import denoiser
from ..mla.window import CausalConfig

KV_CACHES = ("kv_cache1", "kv_cache_pos", "kv_cache_neg")
CROSS_CACHES = ("crossattn_cache", "crossattn_cache_pos", "crossattn_cache_neg")


class SelfForcingGenerator(nn.Module):
    """`generator` of such a pipeline, for a causal `model`, dense or converted.

        generator = SelfForcingGenerator(model, timestep_shift=5.0)
        pipeline = CausalInferencePipeline(config, device=device, generator=generator)
        generator.attach(pipeline)

    A pass whose timesteps are at most `context_timestep`, the pipeline's `context_noise`, keeps the chunk; other
    passes only read what was kept before, so they replay from a CUDA graph where the model's can. A model that was not
    told how to stream (`set_kernels`) takes kernels and graphs where they support it. Every cache of the pipeline
    has one here, so the two of classifier-free guidance do. Chunks, window, sinks and positions are those of
    `model.causal`. `timestep_shift` is that of the scheduler which `get_scheduler` gives.

    Moving it moves the model; casting it leaves the model's data types as they were loaded, in which norms and
    time embeddings stay float32.
    """

    def __init__(self, model: Any, timestep_shift: float = 5.0, context_timestep: float = 0.0) -> None:
        super().__init__()
        if model.kernels is None:
            model.set_kernels("auto")
        self.transformer = model
        self.model = Settings(model.causal)
        self.context_timestep = context_timestep
        self._scheduler = FlowScheduler(timestep_shift)
        # By the identity of the pipeline's cache, which is kept so that no other gets its number.
        self._streams: dict[int, tuple[Any, _Stream]] = {}

    def get_scheduler(self) -> FlowScheduler:
        return self._scheduler

    def attach(self, pipeline: Any) -> None:
        """Have `pipeline` allocate no tensors: its caches hold what it counts and marks in them, and nothing else."""
        # Pipelines reset as many blocks as they believe there are.
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
        """Velocity and clean chunk `[B, F, C, H, W]`, in the data type of the chunk that is given.

        `noisy_image_or_video` `[B, F, C, H, W]` at `timestep` `[B, F]` in [0, 1000]; `conditional_dict` holds
        `prompt_embeds` `[B, L, D]`; `current_start` is the number of tokens before the chunk. `kv_cache` tells streams
        apart and is not read; the last arguments are not used. A chunk at 0 begins a new video, one before
        the end of what was kept is kept anew. Raises ValueError where a chunk was left out or is none of the model's,
        and without a cache.
        """
        if kv_cache is None:
            raise ValueError("this generator streams; for a whole clip without a cache call the model itself")
        x = noisy_image_or_video.transpose(1, 2)
        stream = self._stream(kv_cache, x)
        stream.go_to(current_start, x.shape[2])
        text = conditional_dict["prompt_embeds"].to(self.transformer.dtype)
        hidden_states = x.to(self.transformer.dtype)
        if bool((timestep <= self.context_timestep).all()):
            v = self.transformer(hidden_states, timestep, text, cache=stream.cache, write=True)
        else:
            # What a replay gives is overwritten by the next.
            v = stream.denoise(hidden_states, timestep, text).clone()
        clean = to_clean(x.double(), v.double(), timestep.double() / NUM_TRAIN_TIMESTEPS)
        return v.transpose(1, 2).to(x.dtype), clean.transpose(1, 2).to(x.dtype)

    def _stream(self, kv_cache: Any, x: Tensor) -> _Stream:
        """What stands for the pipeline's `kv_cache`, new where `x` `[B, C, F, H, W]` has another size."""
        size = (len(x), *x.shape[3:])
        _, stream = self._streams.get(id(kv_cache), (None, None))
        if stream is None or stream.size != size:
            stream = _Stream(self.transformer, size)
            self._streams[id(kv_cache)] = (kv_cache, stream)
        return stream

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SelfForcingGenerator:
        place = fn(torch.empty(0, device=self.transformer.device)).device
        self.transformer.to(place)
        return self


class Settings:
    """What pipelines ask of `generator.model`; another chunk than the model's is refused by a ValueError."""

    def __init__(self, causal: CausalConfig) -> None:
        self._causal = causal

    @property
    def local_attn_size(self) -> int:
        """Frames of the window; -1 is none."""
        return self._causal.window_frames or -1

    @property
    def num_frame_per_block(self) -> int:
        return self._causal.num_frames_per_block

    @num_frame_per_block.setter
    def num_frame_per_block(self, frames: int) -> None:
        if frames != self._causal.num_frames_per_block:
            raise ValueError(
                f"the pipeline makes chunks of {frames} frames, the model of {self._causal.num_frames_per_block}; "
                "set the pipeline's num_frame_per_block to that"
            )


class FlowScheduler:
    """The scheduler of such a pipeline: `timesteps` `[1000]` that fall by the `shift`, and noise of their levels."""

    def __init__(self, shift: float) -> None:
        levels = torch.linspace(1, 0, NUM_TRAIN_TIMESTEPS + 1)[:-1]
        self.sigmas = shift_time(levels, shift)
        self.timesteps = self.sigmas * NUM_TRAIN_TIMESTEPS

    def add_noise(self, original_samples: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """`original_samples` `[N, C, H, W]` with `noise` of the levels nearest to `timestep` `[N]`."""
        known = self.timesteps.to(timestep.device)
        nearest = (known - timestep.flatten().unsqueeze(1)).abs().argmin(dim=1)
        sigma = self.sigmas.to(noise.device)[nearest.to(noise.device)]
        return add_noise(original_samples, noise, sigma).type_as(noise)


@dataclass
class _Stream:
    """A cache of the model and its passes, for items of `size` (B, H, W)."""

    model: Any
    size: tuple[int, ...]

    def __post_init__(self) -> None:
        batch, height, width = self.size
        self.cache: FrameCache = self.model.init_cache(batch, height, width)
        self.denoise = denoiser(self.model, self.cache)

    def go_to(self, current_start: int, frames: int) -> None:
        """Make the chunk of `frames` after so many tokens the next one. Raises ValueError."""
        cache = self.cache
        tokens = cache.height * cache.width
        frame, rest = divmod(int(current_start), tokens)
        if rest:
            raise ValueError(
                f"current_start {current_start} is no multiple of the {tokens} tokens of a frame; "
                f"set the pipeline's frame_seq_length to {tokens}"
            )
        expected = cache.causal.chunk_end(frame) - frame
        if frames != expected:
            raise ValueError(f"a chunk of {frames} frames is given at frame {frame}, where the model has {expected}")
        if frame > cache.frames_seen:
            raise ValueError(
                f"the chunk at frame {frame} follows one that was not kept, at frame {cache.frames_seen}; "
                "set context_timestep to the timestep of the pass that keeps finished chunks"
            )
        if frame == cache.frames_seen:
            return
        if frame == 0:
            cache.reset()
        elif cache.is_ring:
            cache.rewind(frame)
        else:
            raise ValueError(f"a {type(cache).__name__} cannot go back to frame {frame}")
