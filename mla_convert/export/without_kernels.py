"""Attends with plain torch, without the kernels that ship with the package.

It replaces `mla.kernels` in the self-contained file of a model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..mla.kernel_settings import History, KernelSettings, Mode


class Kernels:
    """Settings of streaming attention, which runs in plain torch. Raises ValueError for `triton`."""

    def __init__(self, mode: Mode = "auto", history: History = "auto", cuda_graph: bool = True) -> None:
        if mode == "triton":
            raise ValueError("this file has no Triton kernels; install mla-convert to use them")
        self.settings = KernelSettings(mode, history, cuda_graph)

    def leave_free(self, size: int) -> None:
        """Do nothing, because torch keeps no expanded histories."""

    def forget(self) -> None:
        """Do nothing, because nothing is chosen or compared."""

    def takes(self, layer: Any, tokens: Tensor, step: Any) -> None:
        """None: no kernel takes the pass."""

    def attention(self, layer: Any, hidden_states: Tensor, step: Any) -> Tensor | None:
        """None: torch computes the attention."""
        return None

    def report(self) -> dict[str, Any]:
        """The settings and the paths taken, in the keys of the package's `Kernels.report`."""
        return {"mode": self.settings.mode, "paths": {}, "refused": {}, "history": None}

    def announce(self) -> None:
        """Do nothing, because there is no choice to announce."""
