"""Where models run, and that their weights are there."""

from __future__ import annotations

from typing import Any

import torch


def default_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def bring_weights(vae: Any) -> None:
    """Let a hook of offloading bring the weights of a VAE, which its `encode` and `decode` do too late to ask where."""
    if hasattr(getattr(vae, "_hf_hook", None), "pre_forward"):
        vae._hf_hook.pre_forward(vae)
