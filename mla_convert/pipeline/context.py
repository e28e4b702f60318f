"""What the steps of a run share: the recipe, the folder, and models that are read when they are needed."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..devices import default_device
from ..distill.data import Data, DataConfig, open_data
from ..distill.progress import Report
from ..distill.stages.base import REAL_SCORE, TEACHER, StageConfig
from ..evaluate.samples import Comparison
from ..export.checkpoint import load_checkpoint
from ..export.manifest import read_manifest
from ..families.image import needed_conditions
from ..files import MANIFEST
from ..load import Source, load_dense
from ..recipe.schema import Recipe
from ..registry import stages
from .sources import source_of

STAGES, TRAINING = "stages", "training"
CHECKPOINT, SAMPLES, METRICS = "checkpoint", "samples", "metrics.jsonl"
DATA = "data"
ROLLOUTS, KERNELS = "rollouts.safetensors", "kernels"


def stage_names(recipe: Recipe) -> list[str]:
    """`00-convert`, then one name a distillation stage."""
    return [f"{index:02d}-{name}" for index, name in enumerate(["convert", *(s.stage for s in recipe.distill)])]


@dataclass
class Context:
    """One run under way.

    `report` is told how far a step is, `main` is False in the helper processes of a distributed run,
    `seconds` is the wall-clock time of the steps done, `drawn` what its samples show once they are made here.
    """

    recipe: Recipe
    path: Path
    report: Report
    main: bool = True
    seconds: Mapping[str, float] = field(default_factory=dict)
    drawn: Sequence[Comparison] | None = field(default=None, repr=False)
    _dense: Any = field(default=None, repr=False)

    @functools.cached_property
    def source(self) -> Source:
        """The dense model, located and checked; once it is converted, at the commit that was converted."""
        section, made = self.recipe.source, self.stage_folder(0)
        if section.revision is None and (made / MANIFEST).is_file():
            # A repository may move on between a run and its resumption.
            section = section.model_copy(update={"revision": read_manifest(made)["source"]["revision"]})
        return source_of(section, self.recipe.causal)

    @functools.cached_property
    def real_score(self) -> Source | None:
        """The model of the recipe's real score, located and checked."""
        section = self.recipe.real_score
        return None if section is None else source_of(section, self.recipe.causal)

    def networks(self, stage: StageConfig) -> dict[str, Any]:
        """The frozen networks of a stage: the teacher, and a real score that it asks for, which is read for it."""
        found = {TEACHER: self.dense()}
        if self.real_score is not None and REAL_SCORE in stages()[stage.stage](stage).networks:
            assert self.recipe.real_score is not None
            found[REAL_SCORE] = load_dense(self.real_score, getattr(torch, self.recipe.real_score.dtype))
        return found

    @property
    def data_config(self) -> DataConfig:
        """Where the clips lie, those that the run makes itself included."""
        return self.recipe.data.made_in(self.path / DATA)

    @functools.cached_property
    def data(self) -> Data:
        return open_data(self.data_config, self.recipe.seed, needed_conditions(self.source.config))

    @property
    def device(self) -> torch.device:
        """Where models run outside of training."""
        return default_device()

    def dense(self) -> Any:
        """The teacher, read once, in the source's dtype."""
        if self._dense is None:
            self._dense = load_dense(self.source, self.dtype)
        return self._dense

    @property
    def dtype(self) -> torch.dtype:
        """That of the source, in which its models are used."""
        dtype: torch.dtype = getattr(torch, self.recipe.source.dtype)
        return dtype

    def stage_folder(self, index: int) -> Path:
        """Checkpoint of the student after stage `index`; stage 0 is the conversion, -1 the last."""
        return self.path / STAGES / stage_names(self.recipe)[index]

    def training_folder(self, index: int) -> Path:
        """Where stage `index` keeps its metrics and, while it trains, its checkpoints."""
        return self.path / TRAINING / stage_names(self.recipe)[index]

    def load_stage(self, index: int, dtype: torch.dtype | None = None) -> Any:
        """The student after stage `index`, from its files, so that a resumed run sees what this one sees.

        A stage leaves it in float32; `dtype` None keeps that.
        """
        student = load_checkpoint(self.stage_folder(index), dtype)
        student.noise_range = self.recipe.source.noise_range
        return student
