"""Attention by plain torch alone, in place of the kernels that are shipped with the package.

It stands in for `mla.kernels` in the self-contained file of a model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..mla.kernel_settings import History, KernelSettings, Mode


class Kernels:
    """How a model attends while it streams: by torch. Raises ValueError for `triton`."""

    def __init__(self, mode: Mode = "auto", history: History = "auto", cuda_graph: bool = True) -> None:
        if mode == "triton":
            raise ValueError("this file attends by torch; install mla-convert for its kernels")
        self.settings = KernelSettings(mode, history, cuda_graph)

    def leave_free(self, size: int) -> None:
        """Nothing: torch keeps no histories."""

    def takes(self, layer: Any, tokens: Tensor, step: Any) -> bool:
        """False: torch is to attend."""
        return False

    def attention(self, layer: Any, hidden_states: Tensor, step: Any) -> Tensor | None:
        """None: torch is to do it."""
        return None

    def report(self) -> dict[str, Any]:
        """What was chosen."""
        return {"mode": self.settings.mode, "paths": {}, "refused": {}, "history": None}

    def announce(self) -> None:
        """Nothing: there was no choice."""
