"""How a model in a folder is executed: what a user of `generate` and `vbench` chooses beside the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..export.manifest import recorded_section
from ..families.causal import CausalTransformer
from ..recipe.schema import validate
from ..run.offload import Offload
from ..run.streaming import StreamingConfig
from .experts import load_models


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Data types, offloading and streaming of a model and its VAE.

    `dtype` is that of the model, by default the stored one. `vae_dtype` is that in which the VAE decodes, and encodes a
    source; by default float32. `streaming` has keys of StreamingConfig, which replace those of the recipe that made the
    model.
    """

    dtype: str | None = None
    vae_dtype: str | None = None
    offload: Offload = "none"
    streaming: Mapping[str, Any] = field(default_factory=dict)

    def streaming_of(self, root: Path) -> StreamingConfig:
        """The settings for the checkpoint in `root`. Raises UserError in one line."""
        return validate(StreamingConfig, {**recorded_section(root, "streaming"), **self.streaming})

    def load(self, folder: Path) -> list[CausalTransformer]:
        """Load the model of `folder`, or its experts, on the CPU. Raises UserError in one line."""
        return load_models(folder, None if self.dtype is None else getattr(torch, self.dtype))

    def cast(self, vae: Any) -> None:
        """Give a VAE, if there is one, its dtype."""
        if vae is not None and self.vae_dtype is not None:
            # diffusers' own `to` warns about modules that must stay in float32; this VAE has none.
            nn.Module.to(vae, getattr(torch, self.vae_dtype))
