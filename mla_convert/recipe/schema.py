"""The recipe of one conversion: strict, versioned, composed from the sections' own classes."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator

from ..convert.config import ConvertConfig
from ..distill.data import DataConfig
from ..distill.stages.base import StageConfig
from ..errors import UsageError
from ..evaluate.config import EvaluateConfig
from ..export.checkpoint import ExportConfig
from ..mla.window import CausalConfig
from ..registry import stages
from ..run.config import GenerateConfig
from .explain import describe, explain, nearest

Model = TypeVar("Model", bound=BaseModel)


class SourceConfig(BaseModel):
    """Where the dense model comes from; `model` is `zoo:digits`, a path or a Hub id."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    subfolder: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class Recipe(BaseModel):
    """Everything that decides what a run computes; nothing about where it runs.

    `causal` replaces the chunks and window of the source's own configuration.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    source: SourceConfig
    causal: CausalConfig | None = None
    data: DataConfig
    convert: ConvertConfig
    distill: tuple[SerializeAsAny[StageConfig], ...] = ()
    evaluate: EvaluateConfig = EvaluateConfig()
    generate: GenerateConfig = GenerateConfig()
    export: ExportConfig = ExportConfig()

    @field_validator("distill", mode="before")
    @classmethod
    def _resolve_stages(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return tuple(_resolve_stage(entry, f"distill.{index}") for index, entry in enumerate(value))

    def dump(self) -> str:
        """The resolved recipe as YAML, every default written out; equal recipes give equal text."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def sha256(self) -> str:
        """Digest of the resolved recipe."""
        return hashlib.sha256(self.dump().encode()).hexdigest()


def _resolve_stage(entry: Any, path: str) -> StageConfig:
    """The configuration class that the stage's name calls for, validated."""
    if not isinstance(entry, dict):
        raise UsageError(f"{path}: expected a section of keys, got {describe(entry)}")
    known = stages()
    name = entry.get("stage")
    if name is None:
        raise UsageError(f"missing key {path}.stage; one of {', '.join(known)}")
    if name not in known:
        raise UsageError(f"{path}.stage: no stage is called {name!r}; {nearest(str(name), list(known))}")
    return validate(known[name].config_class, entry, path)


def validate(model: type[Model], value: Any, path: str = "") -> Model:
    """`value` as `model`, with types taken literally. Raises UsageError in one line."""
    try:
        # JSON mode is strict about scalars yet takes a list for a tuple.
        return model.model_validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise UsageError(explain(error, model, path)) from None
