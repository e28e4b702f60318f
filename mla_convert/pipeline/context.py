"""Holds what the steps of a run share: the recipe, the run folder, and models that are loaded on first use."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..devices import default_device
from ..distill.data import Data, DataConfig, LatentClips, open_data
from ..distill.progress import Report
from ..distill.shard_index import ShardIndex, read_index, write_index
from ..distill.sharding import from_main
from ..distill.stages.base import REAL_SCORE, TEACHER, ImageLatent, StageConfig
from ..distill.waiting import Notices
from ..errors import UserError
from ..evaluate.samples import Comparison
from ..export.checkpoint import load_checkpoint
from ..export.manifest import read_manifest
from ..export.run_folder import STAGES
from ..families.causal import CausalTransformer, LatentTransformer
from ..families.image import needed_conditions
from ..files import MANIFEST
from ..load import Source, load_dense
from ..recipe.schema import Recipe, continued
from ..registry import stage_of
from ..run.config import GenerateConfig
from ..run.reencode import image_latent
from .clip_size import index_of, sized
from .sources import source_of
from .vae import source_vae

TRAINING = "training"
CHECKPOINT, SAMPLES, METRICS = "checkpoint", "samples", "metrics.jsonl"
DATA, CLIPS = "data", ".clips.json"
ROLLOUTS, KERNELS = "rollouts.safetensors", "kernels"


def stage_names(recipe: Recipe) -> list[str]:
    """`00-convert`, then one name for each distillation stage."""
    return [f"{index:02d}-{name}" for index, name in enumerate(["convert", *(s.stage for s in recipe.distill)])]


@dataclass
class Context:
    """The state of a run in progress.

    `report` receives the progress of a step. `main` is False in every process of a distributed run but the first.
    `notices` are those of the run's processes. `seconds` is the wall-clock time of each finished step, `outputs` are
    the digests of what they wrote, by path; only the first process has both. `drawn` holds the sample videos once this
    process has made them.
    """

    recipe: Recipe
    path: Path
    report: Report
    main: bool = True
    notices: Notices = field(default_factory=lambda: Notices("alone"), repr=False)
    seconds: Mapping[str, float] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict, repr=False)
    drawn: Sequence[Comparison] | None = field(default=None, repr=False)
    _clips: ShardIndex | None = field(default=None, repr=False)
    _dense: Any = field(default=None, repr=False)

    @functools.cached_property
    def source(self) -> Source:
        """The dense model, located and checked; after the conversion, at the commit that was converted."""
        section, converted = self.recipe.source, self.stage_folder(0)
        if section.revision is None and (converted / MANIFEST).is_file():
            # A Hub repository may change before the run is resumed.
            section = section.model_copy(update={"revision": read_manifest(converted)["source"]["revision"]})
        return source_of(section, self.recipe.causal)

    @functools.cached_property
    def real_score(self) -> Source | None:
        """The model of the recipe's `real_score`, located and checked; None without that section."""
        section = self.recipe.real_score
        return None if section is None else source_of(section, self.recipe.causal)

    def networks(self, stage: StageConfig) -> dict[str, Any]:
        """Load those of the teacher and the real score that a stage uses; a teacher that it does not use is dropped."""
        networks: dict[str, Any] = {}
        if TEACHER in stage_of(stage).needed:
            networks[TEACHER] = self.dense()
        else:
            # Every process of a launch would keep it in memory.
            self._dense = None
        if self.real_score is not None and REAL_SCORE in stage_of(stage).frozen:
            assert self.recipe.real_score is not None
            networks[REAL_SCORE] = load_dense(self.real_score, getattr(torch, self.recipe.real_score.dtype))
        return networks

    def image_latent(self, stage: StageConfig) -> ImageLatent | None:
        """What encodes a video's last frame as an image with the source's VAE, if a stage needs that."""
        if not stage.reencodes:
            return None
        return functools.partial(image_latent, source_vae(self.source, self.stage_folder(0)))

    @property
    def data_config(self) -> DataConfig:
        """The data section, with the run's own folder for clips that it generates itself."""
        return self.recipe.data.made_in(self.path / DATA)

    @functools.cached_property
    def data(self) -> Data:
        """The training clips. The index of a folder is that of the first process, or what this run wrote before."""
        config = self.data_config
        known = self._clips
        if known is None and config.folder is not None:
            known = read_index(self.path / CLIPS, Path(config.folder))
        needed = needed_conditions(self.source.config)
        checked, skippable = self._clips is not None, self.recipe.data.kind == "latents"
        return open_data(config, self.recipe.seed, needed, known, checked, skippable)

    @functools.cached_property
    def generate(self) -> GenerateConfig:
        """The recipe's `generate` section, at the size of the run's clips unless it has a size of its own."""
        return sized(self.recipe.generate, self.recipe.data, self._index)

    def _index(self) -> ShardIndex | None:
        """The index of the clips in a folder; once they are gone, the one that the run has kept."""
        try:
            data = self.data
        except UserError:
            known = read_index(self.path / CLIPS, Path(self.recipe.data.folder or ""))
            if known is None:
                raise
            return known
        return index_of(data)

    def keep_index(self) -> None:
        """Write the index of the clips, if they have been opened, for a resumed run."""
        data = vars(self).get("data")
        if isinstance(data, LatentClips) and self.recipe.data.kind == "latents":
            write_index(self.path / CLIPS, data.shards.index)

    def share_clips(self) -> None:
        """Open the clips in the first process alone and pass their index on; every process calls this."""
        data = self.notices.led("clips", self.main, lambda: self.data)
        index: ShardIndex | None = from_main(data.shards.index if isinstance(data, LatentClips) else None)
        if self.main:
            self.keep_index()
        else:
            self._clips = index

    @property
    def device(self) -> torch.device:
        """The device on which models run outside of training."""
        return default_device()

    def dense(self) -> CausalTransformer:
        """The teacher in the source's dtype, loaded on the first call."""
        if self._dense is None:
            self._dense = self.load_dense()
        return self._dense

    def load_dense(self) -> CausalTransformer:
        """Load the teacher anew, without keeping it."""
        return load_dense(self.source, self.dtype)

    def unload_dense(self) -> None:
        """Move the teacher, if it is loaded, to host memory."""
        if self._dense is not None:
            self._dense.to("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The source's dtype, which the teacher and the student have outside of training."""
        dtype: torch.dtype = getattr(torch, self.recipe.source.dtype)
        return dtype

    def stage_folder(self, index: int) -> Path:
        """Folder of the student's checkpoint after stage `index`; stage 0 is the conversion, -1 the last one."""
        return self.path / STAGES / stage_names(self.recipe)[index]

    def training_folder(self, index: int) -> Path:
        """Folder in which stage `index` stores its metrics and, while it trains, its checkpoints."""
        return self.path / TRAINING / stage_names(self.recipe)[index]

    def second_start(self, index: int) -> Path | None:
        """The second network that an earlier stage left for stage `index`, which continues it; else None."""
        second = stage_of(self.recipe.distill[index - 1]).second
        left_by = continued(self.recipe, index)
        if second is None or left_by is None:
            return None
        return self.training_folder(left_by) / second.file

    def start(self, index: int) -> str:
        """A digest of the weights with which stage `index` begins: the student's and those of `second_start`."""
        begins = {self.stage_folder(index - 1), self.second_start(index)}
        read = {
            name: digest
            for name, digest in self.outputs.items()
            if name.endswith(".safetensors") and begins & {self.path / name, *(self.path / name).parents}
        }
        return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()

    def load_stage(self, index: int, dtype: torch.dtype | None = None) -> LatentTransformer:
        """Load the student after stage `index` from disk, so that a resumed run sees the same weights.

        Stages store it in float32; `dtype` None keeps that.
        """
        student = load_checkpoint(self.stage_folder(index), dtype)
        assert isinstance(student, LatentTransformer)
        student.noise_range = self.recipe.source.noise_range
        return student
