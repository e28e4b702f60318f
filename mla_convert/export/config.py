"""Defines the recipe's `export` section."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, field_validator

from ..dtypes import full_name

DEFAULT_SHARD_SIZE = "5GB"


class ExportConfig(BaseModel):
    """The form of an exported checkpoint.

    - `dtype: null` keeps the weights' type; modules that the model keeps in float32 stay there.
    - `max_shard_size` is a number with KB, MB or GB.
    - `form`: an `installed` checkpoint loads where this package is installed; a `standalone` one includes its class in
      one file.
    - `components` decides what happens to the source's scheduler, tokenizer, text encoder and VAE: `reference` names
      them where the source is on the Hub, `copy` writes them beside the transformer, `none` leaves them out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Annotated[Literal["float32", "bfloat16", "float16"], BeforeValidator(full_name)] | None = None
    max_shard_size: str = DEFAULT_SHARD_SIZE
    form: Literal["installed", "standalone"] = "installed"
    components: Literal["reference", "copy", "none"] = "reference"

    @field_validator("max_shard_size")
    @classmethod
    def _size_has_a_unit(cls, value: str) -> str:
        if re.fullmatch(r"[1-9][0-9]*(KB|MB|GB)", value) is None:
            raise ValueError(f"expected a whole number with KB, MB or GB, such as 5GB, got {value!r}")
        return value

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return None if self.dtype is None else getattr(torch, self.dtype)
