"""The form in which a checkpoint leaves: the recipe's `export` section."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

DEFAULT_SHARD_SIZE = "5GB"


class ExportConfig(BaseModel):
    """The form in which a checkpoint leaves.

    `dtype: null` keeps that of the weights; modules that the model keeps in float32 stay there.
    `max_shard_size` is a number with KB, MB or GB. An `installed` checkpoint loads where this package is
    installed, a `standalone` one brings its class along in one file. `components` says what becomes of
    the source's scheduler, tokenizer, text encoder and VAE: `reference` names them where the source is on
    the Hub, `copy` writes them beside the transformer, `none` leaves them out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    max_shard_size: str = Field(DEFAULT_SHARD_SIZE, pattern=r"^[1-9][0-9]*(KB|MB|GB)$")
    form: Literal["installed", "standalone"] = "installed"
    components: Literal["reference", "copy", "none"] = "reference"

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return None if self.dtype is None else getattr(torch, self.dtype)
