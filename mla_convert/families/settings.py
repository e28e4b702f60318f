"""Chooses how a causal model streams, and says what diffusers' own settings of a model do and do not reach."""

from __future__ import annotations

import logging
from typing import Any

from ..errors import UserError
from ..mla.bits import CacheBits
from ..mla.kernel_settings import History, Mode
from ..mla.kernels import Kernels
from ..mla.parallel import check_group

logger = logging.getLogger(__name__)


class StreamingSettings:
    """Mixin of a model for its streaming passes: kernels, the processes that share a chunk, and the cache's bits."""

    config: Any
    kernels: Kernels | None = None
    parallel: Any = None
    cache_bits: CacheBits = "auto"

    def set_kernels(self, mode: Mode, history: History = "auto", cuda_graph: bool = True) -> Kernels:
        """Choose how `forward_chunk` attends without gradients; see `KernelSettings` for the arguments.

        The report of the returned `Kernels` says what was chosen. Without this call, torch attends.
        """
        self.kernels = Kernels(mode, history, cuda_graph)
        return self.kernels

    def set_parallel(self, group: Any) -> None:
        """Divide every chunk of a rollout among the processes of a `torch.distributed` group; None ends that.

        Each process must have the same weights and make the same calls with the same arguments, without gradients; all
        get the same results. Caches are made afterwards: of dense keys and values, each process keeps its own heads.
        Raises UserError if the processes cannot divide the attention heads.
        """
        check_group(group, self.config.num_attention_heads)
        if self.kernels is not None:
            self.kernels.forget()
        self.parallel = group

    def set_cache(self, cache: CacheBits) -> None:
        """Choose the number of bits for the latents of caches from `init_cache` without a dtype.

        Raises ValueError for unsupported bits, and UserError for fewer bits if the rows are not latents in a ring.
        """
        if cache != "auto":
            reason = "has no latents in a ring of frames, so they cannot be stored in fewer bits"
            if not self.config.get("mla"):
                reason = "is dense, and fewer bits are for the latents of converted models"
            raise UserError(f"{type(self).__name__} {reason}; leave streaming.cache (--cache) at auto")

    def enable_cache(self, config: Any) -> None:
        """Raises UserError: diffusers' caches skip work by the steps of one clip, but here every chunk has its own."""
        raise UserError(
            f"{type(self).__name__} does not support enable_cache ({type(config).__name__}), which would reuse another "
            "chunk's results; leave it out"
        )

    def enable_parallelism(self, **settings: Any) -> None:
        """Raises UserError: diffusers' plans are for a clip whose tokens all see each other."""
        raise UserError(f"{type(self).__name__} does not support enable_parallelism; use set_parallel")

    def set_attention_backend(self, backend: str) -> None:
        """Choose diffusers' backend for cross-attention; `set_kernels` chooses for self-attention."""
        logger.warning(
            "set_attention_backend(%r) applies to cross-attention only; self-attention follows set_kernels", backend
        )
        stock: Any = super()
        stock.set_attention_backend(backend)
