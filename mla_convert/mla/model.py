"""Declares `StreamingModel`, what a rollout expects of a causal model, dense or latent, of any family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .bits import CacheBits
from .cache import FrameCache
from .kernel_settings import History, Mode
from .kernels import Kernels
from .rope import RotaryTable
from .window import CausalConfig


class StreamingModel(Protocol):
    """A causal model as rollouts see it; `families.causal.CausalTransformer` describes the members.

    Code below `families`, and rollouts, which take their models as arguments, name this type. Code that also reads the
    blocks of a model or trains it names `CausalTransformer`.
    """

    training: bool

    @property
    def config(self) -> Any: ...

    @property
    def causal(self) -> CausalConfig: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def kernels(self) -> Kernels | None: ...

    @property
    def parallel(self) -> Any: ...

    @property
    def flow_map(self) -> bool: ...

    @property
    def noise_range(self) -> tuple[float, float]: ...

    @property
    def noise_channels(self) -> int: ...

    @property
    def condition_kinds(self) -> Mapping[str, str]: ...

    @property
    def needed_conditions(self) -> tuple[str, ...]: ...

    def rotary_table(self) -> RotaryTable: ...

    def init_cache(
        self,
        batch_size: int,
        height: int,
        width: int,
        window_frames: int | None = None,
        sink_frames: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> FrameCache: ...

    def set_parallel(self, group: Any) -> None: ...

    def set_cache(self, cache: CacheBits) -> None: ...

    def set_kernels(self, mode: Mode, history: History = "auto", cuda_graph: bool = True) -> Kernels: ...

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        /,
        *,
        cache: FrameCache,
        write: bool = False,
        **conditions: Tensor,
    ) -> Tensor:
        """The velocity of the next chunk, as `forward_chunk` returns it."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...
