"""The model that a conversion starts from: located, recognised and checked, not yet read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from huggingface_hub import metadata_load

from .. import registry
from ..errors import UserError
from ..families.base import Family, Geometry
from .build import accepted_config, build_model, check_tensors
from .hub import download
from .tensors import LazyTensors
from .weights import CONFIG, FOREIGN_WEIGHTS, WEIGHTS, open_weights, read_config, weight_files

ZOO = Path(__file__).parents[1] / "zoo"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """A dense model of a supported family.

    `config` holds what `family.dense_class` takes, `causal` included where it is known. `tensors`
    have the names and shapes of that class and are read when they are asked for. `origin` is what the
    user called the model, `revision` the commit if it came from the Hub, `licence` the identifier in
    its model card.
    """

    family: Family
    config: dict[str, Any]
    tensors: LazyTensors
    origin: str
    folder: Path
    licence: str | None = None
    revision: str | None = None

    @property
    def geometry(self) -> Geometry:
        return self.family.geometry(self.config)

    def provenance(self) -> dict[str, Any]:
        """What a manifest records about the source."""
        return {
            "model": self.origin,
            "revision": self.revision,
            "family": self.family.name,
            "license": self.licence,
        }


class _Located(NamedTuple):
    """A folder with a configuration, or a single weights file in a folder that may lack one."""

    folder: Path
    file: Path | None = None
    revision: str | None = None


def load_source(
    model: str, subfolder: str | None = None, revision: str | None = None, causal: dict[str, Any] | None = None
) -> Source:
    """Find `model`, recognise its family, and check names, shapes and dtypes of all its tensors.

    `model` is `zoo:NAME`, a transformer's folder, a pipeline's folder, a single .safetensors file
    (with config.json beside it unless its shapes tell everything), or a Hub id. `causal` replaces the
    `causal` section of config.json. Raises UserError in one line.
    """
    located = _locate(model, subfolder, revision)
    where = str(located.file or located.folder)
    if located.file is None or (located.folder / CONFIG).is_file():
        stored = read_config(located.folder)
        family = _recognise(stored, located.folder / CONFIG)
        tensors = LazyTensors.from_files([located.file]) if located.file else open_weights(located.folder)
        tensors = _in_our_names(family, tensors)
    else:
        family, stored, tensors = _infer(located.file)
    config = accepted_config(family.dense_class, stored)
    if causal is not None:
        config["causal"] = causal
    tensors = check_tensors(family.dense_class, config, tensors, where)
    return Source(family, config, tensors, model, located.folder, _licence(located.folder), located.revision)


def load_dense(source: Source, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Any:
    """The dense causal model of a source, in eval mode; `dtype` None keeps the stored dtypes.

    Raises UserError for a tensor with a NaN or an infinity.
    """
    return build_model(source.family.dense_class, source.config, source.tensors, dtype, device)


def check_finite(source: Source) -> None:
    """Read every tensor once; raises UserError that names the first with a NaN or an infinity."""
    for name in source.tensors:
        source.tensors[name]


def _locate(model: str, subfolder: str | None, revision: str | None) -> _Located:
    path = Path(model).expanduser()
    if model.startswith("zoo:"):
        folder = ZOO / model.removeprefix("zoo:") / "teacher"
        if not folder.is_dir():
            known = sorted(f"zoo:{found.parent.name}" for found in ZOO.glob("*/teacher"))
            raise UserError(f"there is no model {model} in this package; it has {', '.join(known) or 'none'}")
        return _Located(_transformer_folder(folder, subfolder))
    if path.is_dir():
        return _Located(_transformer_folder(path, subfolder))
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{path} is not a .safetensors file; convert it to safetensors first")
        return _Located(path.parent, path)
    if path.suffix in (".safetensors", *FOREIGN_WEIGHTS) or not _HUB_ID.fullmatch(model):
        raise UserError(f"{model} does not exist; give a folder, a .safetensors file, a Hub id or zoo:NAME")
    return _locate_on_hub(model, subfolder, revision)


def _locate_on_hub(model: str, subfolder: str | None, revision: str | None) -> _Located:
    """Download configurations first, so that what cannot be converted is refused before its weights come."""
    inner = subfolder or "transformer"
    index = f"{WEIGHTS}.index.json"
    small = [CONFIG, index, "model_index.json", "README.md", f"{inner}/{CONFIG}", f"{inner}/{index}"]
    snapshot = download(model, revision, small)
    commit = snapshot.name
    folder = _transformer_folder(snapshot, subfolder)
    _recognise(read_config(folder), folder / CONFIG)
    prefix = "" if folder == snapshot else f"{folder.relative_to(snapshot).as_posix()}/"
    download(model, commit, [*small, *(f"{prefix}{name}" for name in weight_files(folder) or [WEIGHTS])])
    return _Located(folder, revision=commit)


def _transformer_folder(folder: Path, subfolder: str | None) -> Path:
    """The folder of the transformer in a model's folder. Raises UserError."""
    if subfolder is not None:
        if not (folder / subfolder).is_dir():
            raise UserError(f"{folder} has no folder {subfolder}")
        return folder / subfolder
    is_pipeline = (folder / "model_index.json").is_file() or not (folder / CONFIG).is_file()
    inner = folder / "transformer"
    if is_pipeline and inner.is_dir():
        return inner
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} has neither {CONFIG} nor transformer/{CONFIG}; it is not a diffusers model")
    return folder


def _recognise(config: dict[str, Any], path: Path) -> Family:
    """The family that a configuration belongs to. Raises UserError with the reason and what is supported."""
    name = str(config.get("_class_name", "not given"))
    families: list[Family] = list(registry.families().values())
    for family in families:
        if name in family.source_classes:
            return family
        if name == family.mla_class.__name__:
            raise UserError(f"{path}: the model is already converted ({name}); start from the dense model")
    reasons = [f"{name}: {family.near_misses[name]}" for family in families if name in family.near_misses]
    supported = ", ".join(cls for family in families for cls in family.source_classes)
    detail = reasons[0] if reasons else f"its class is {name}"
    raise UserError(f"{path}: this model cannot be converted ({detail}); supported are {supported}")


def _in_our_names(family: Family, tensors: LazyTensors) -> LazyTensors:
    renamed = family.stored_names(tensors)
    return tensors if renamed is None else tensors.select(renamed)


def _infer(file: Path) -> tuple[Family, dict[str, Any], LazyTensors]:
    """Family, configuration and tensors of a file that has no configuration beside it. Raises UserError."""
    tensors = LazyTensors.from_files([file])
    families: list[Family] = list(registry.families().values())
    for family in families:
        named = _in_our_names(family, tensors)
        config = family.infer_config(named.shapes())
        if config is not None:
            return family, config, named
    supported = ", ".join(cls for family in families for cls in family.source_classes)
    raise UserError(f"{file}: the tensors are of no supported model ({supported}); put its {CONFIG} beside the file")


def _licence(folder: Path) -> str | None:
    """Licence identifier in the model card of a transformer's folder or of its pipeline."""
    for card in (folder / "README.md", folder.parent / "README.md"):
        if card.is_file():
            try:
                licence = (metadata_load(card) or {}).get("license")
            except (ValueError, yaml.YAMLError):
                continue
            if isinstance(licence, str):
                return licence
    return None
