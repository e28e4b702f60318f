"""Define the recipe of one conversion: strict, versioned, composed of section classes from other packages."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from ..convert.config import ConvertConfig
from ..distill.data import DataConfig
from ..distill.stages.base import REAL_SCORE, StageConfig
from ..dtypes import full_name
from ..errors import RecipeError, UsageError, nearest
from ..evaluate.config import EvaluateConfig
from ..explain import describe, explain
from ..export.config import ExportConfig
from ..flow import ALL_NOISE
from ..load import AdapterConfig
from ..mla.window import CausalConfig
from ..registry import stage_of, stages
from ..run.config import GenerateConfig
from ..run.streaming import StreamingConfig
from ..sampling import Seed

Model = TypeVar("Model", bound=BaseModel)

NoiseRange = tuple[float, float]


def _check_name(value: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value) is None:
        raise ValueError(
            f"use letters, digits, dots, dashes and underscores, and start with a letter or digit, got {value!r}"
        )
    return value


Name = Annotated[str, AfterValidator(_check_name)]
"""A string that is safe as the name of a folder."""


class SourceConfig(BaseModel):
    """Where the dense model comes from; `model` is `zoo:digits`, a path or a Hub ID.

    - `file` names one weights file, or the index of its shards, in that folder or Hub repository (in `subfolder` if
      given).
    - `use_ema` chooses between the averaged and the trained weights of a training checkpoint. Without it, the averaged
      weights are used where the file has them, as in the published commands of Self-Forcing and of Causal-Forcing's
      frame-wise model.
    - `noise_range` is the range of noise levels that the model is for; with several experts, each has its own.
      Calibration, training and measurement use only these levels.
    - `adapters` are LoRA files that belong to the model, such as the one that LongLive publishes beside its base.
    - `components` is the folder or Hub ID of a pipeline with the VAE and text encoder, for a model that is published
      without them (Self-Forcing, LongLive). `generate` and exports look for them there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str
    subfolder: str | None = None
    revision: str | None = None
    file: str | None = None
    use_ema: bool | None = None
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], BeforeValidator(full_name)] = "float32"
    noise_range: NoiseRange = ALL_NOISE
    adapters: tuple[AdapterConfig, ...] = ()
    components: str | None = None

    @field_validator("noise_range")
    @classmethod
    def _range_is_inside(cls, value: NoiseRange) -> NoiseRange:
        if not 0 <= value[0] < value[1] <= 1:
            raise ValueError(f"a noise range must rise within [0, 1], got {list(value)}")
        return value


class Recipe(BaseModel):
    """Everything that decides what a run computes; nothing about where it runs.

    - `causal` replaces the chunks and window of the source's own configuration.
    - `real_score` is the model that scores the student's videos in a stage `dmd` with `real_score: real_score`.
    - `experts` names the subfolders of a source whose models share the noise levels, each with its range. They are
      converted one by one; `convert` and `distill` take `--expert`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    version: Literal[1]
    name: Name
    seed: Seed = 0
    source: SourceConfig
    real_score: SourceConfig | None = None
    experts: dict[Name, NoiseRange] | None = None
    causal: CausalConfig | None = None
    data: DataConfig
    convert: ConvertConfig
    distill: tuple[SerializeAsAny[StageConfig], ...] = ()
    evaluate: EvaluateConfig = EvaluateConfig()
    generate: GenerateConfig = GenerateConfig()
    streaming: StreamingConfig = StreamingConfig()
    export: ExportConfig = ExportConfig()

    @field_validator("distill", mode="before")
    @classmethod
    def _stages(cls, value: Any) -> Any:
        return _resolve_stages(value)

    @field_validator("experts")
    @classmethod
    def _experts_tile_the_noise(cls, value: dict[str, NoiseRange] | None) -> dict[str, NoiseRange] | None:
        if value is None:
            return None
        ranges = sorted(value.values())
        ends = [0.0, *(high for _, high in ranges)]
        starts = [*(low for low, _ in ranges), 1.0]
        if len(ranges) < 2 or ends != starts or any(low >= high for low, high in ranges):
            shown = ", ".join(f"{name} {list(share)}" for name, share in value.items()) or "none"
            raise ValueError(f"the noise ranges of two or more experts must tile [0, 1] without a gap, got {shown}")
        return value

    @model_validator(mode="after")
    def _experts_roll_out_together(self) -> Recipe:
        if self.experts is not None and (self.source.subfolder is not None or self.source.noise_range != ALL_NOISE):
            raise ValueError("experts are the subfolders of the source; leave out source.subfolder and noise_range")
        if self.experts is not None and self.source.adapters:
            raise ValueError(
                "source.adapters belong to one model; write a recipe with source.subfolder for each expert"
            )
        if self.experts is None and self.source.noise_range == ALL_NOISE:
            return self
        for key, wanted in (
            ("generate.prompts", self.generate.prompts),
            ("evaluate.rollout_prompts", self.data.kind == "digits" and self.evaluate.rollout_prompts),
            ("data.kind: rollouts", self.data.kind == "rollouts"),
            ("convert.calibration.source: rollouts", self.convert.calibration.source == "rollouts"),
        ):
            if wanted:
                raise ValueError(f"{key} needs a rollout, which takes all experts; leave it out and use generate")
        return self

    @model_validator(mode="after")
    def _real_score_goes_with_a_stage(self) -> Recipe:
        used = any(REAL_SCORE in stage_of(config).frozen for config in self.distill)
        if used and self.real_score is None:
            raise ValueError("a stage has real_score: real_score, but the recipe has no section real_score; add one")
        if self.real_score is not None and not used:
            raise ValueError("the section real_score needs a stage dmd with real_score: real_score; remove it")
        if self.real_score is not None and self.real_score.noise_range != ALL_NOISE:
            raise ValueError("the real score is evaluated at all noise levels; leave out real_score.noise_range")
        return self

    @model_validator(mode="after")
    def _what_continues_has_begun(self) -> Recipe:
        for index, config in enumerate(self.distill, start=1):
            second = stage_of(config).second
            if second is not None and second.continues and continued(self, index) is None:
                raise ValueError(
                    f"distill.{index - 1}.{second.name}: previous needs a stage {config.stage} before it; set teacher"
                )
        return self

    def expert(self, name: str) -> Recipe:
        """The recipe of one expert. Raises UsageError if the recipe has no expert of this name."""
        if not self.experts:
            raise UsageError(f"recipe {self.name} has no experts; leave out --expert")
        if name not in self.experts:
            raise UsageError(f"recipe {self.name} has no expert {name!r}; {nearest(name, list(self.experts))}")
        source = self.source.model_copy(update={"subfolder": name, "noise_range": self.experts[name]})
        return self.model_copy(update={"name": f"{self.name}-{name}", "experts": None, "source": source})

    def dump(self) -> str:
        """The resolved recipe as YAML with all defaults written out; equal recipes give equal text."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def sha256(self) -> str:
        """The SHA-256 hex digest of the resolved recipe."""
        return hashlib.sha256(self.dump().encode()).hexdigest()


def continued(recipe: Recipe, index: int) -> int | None:
    """The stage whose second network stage `index` continues, both counted from 1; None if it begins anew."""
    second = stage_of(recipe.distill[index - 1]).second
    if second is None or not second.continues:
        return None
    others = [(other, stage_of(recipe.distill[other - 1]).second) for other in range(index - 1, 0, -1)]
    return next((other for other, its in others if its is not None and its.name == second.name), None)


def _resolve_stages(value: Any) -> Any:
    """Validate the entries of `distill`; what is no list is returned. Raises RecipeError with all their mistakes."""
    if not isinstance(value, list):
        return value
    resolved: list[StageConfig] = []
    wrong: list[str] = []
    for index, entry in enumerate(value):
        try:
            resolved.append(_resolve_stage(entry, f"distill.{index}"))
        except UsageError as error:
            wrong += error.lines if isinstance(error, RecipeError) else [str(error)]
    if wrong:
        raise RecipeError(*wrong)
    return tuple(resolved)


def _resolve_stage(entry: Any, path: str) -> StageConfig:
    """Validate an entry of `distill` with the configuration class of its stage."""
    if not isinstance(entry, dict):
        raise UsageError(f"{path}: expected a section of keys, got {describe(entry)}")
    by_name = stages()
    name = entry.get("stage")
    if name is None:
        raise UsageError(f"missing key {path}.stage; one of {', '.join(by_name)}")
    if not isinstance(name, str):
        raise UsageError(f"{path}.stage: expected a string, got {describe(name)}")
    if name not in by_name:
        raise UsageError(f"{path}.stage: no stage is called {name!r}; {nearest(name, list(by_name))}")
    return validate(by_name[name].config_class, entry, path)


def validate(model: type[Model], value: Any, path: str = "") -> Model:
    """Validate `value` as `model` in strict mode, without type coercion. Raises RecipeError."""
    try:
        # Strict JSON mode is strict about scalars, but accepts a list for a tuple.
        return model.model_validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise RecipeError(*explain(error, model, path)) from None


def validate_recipe(value: dict[str, Any]) -> Recipe:
    """Validate a whole recipe. Raises RecipeError with all its mistakes, those of the stages first."""
    try:
        _resolve_stages(value.get("distill"))
    except RecipeError as error:
        wrong = error.lines
    else:
        return validate(Recipe, value)
    try:
        Recipe.model_validate_json(json.dumps({**value, "distill": []}), strict=True)
    except ValidationError as error:
        # A mistake of the recipe as a whole, which has no key, may follow from the missing stages.
        if all(detail["loc"] for detail in error.errors()):
            wrong += tuple(explain(error, Recipe))
    raise RecipeError(*wrong)
