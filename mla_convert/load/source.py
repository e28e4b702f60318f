"""Locates, recognizes and checks the model that a conversion starts from, without reading its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import metadata_load

from ..families.base import AttentionGeometry, Family, attention_geometry
from ..families.causal import CausalTransformer
from ..flow import ALL_NOISE
from .adapters import PEFT_CONFIG, AdapterConfig, adapted, module_names
from .build import accepted_config, build_model, check_tensors
from .locate import Located, locate, locate_file
from .recognize import in_our_layout, in_our_names, infer, recognize
from .states import find_state
from .tensors import LazyTensors
from .weights import open_file, open_weights, read_config


@dataclass(frozen=True)
class Source:
    """A dense model of a supported family.

    `config` holds the arguments of `family.dense_class`, including `causal` if it is known. `tensors` have the names
    and shapes of that class and are read on access. `origin` is the user's name for the model, `revision` the commit if
    it came from the Hub, and `license` the identifier in its model card. `file` is the weights file that the user named
    in it, `state` the key of the weights in a training checkpoint, and `noise_range` the noise levels that the model
    serves. `adapters` are those added to the tensors on access, as a manifest records them. `components` is the folder
    or Hub ID of another pipeline whose VAE and text encoder belong to the model.
    """

    family: Family
    config: dict[str, Any]
    tensors: LazyTensors
    origin: str
    folder: Path
    license: str | None = None
    revision: str | None = None
    file: str | None = None
    state: str | None = None
    noise_range: tuple[float, float] = ALL_NOISE
    adapters: tuple[dict[str, Any], ...] = ()
    components: str | None = None

    @property
    def geometry(self) -> AttentionGeometry:
        return attention_geometry(self.config)

    def provenance(self) -> dict[str, Any]:
        """The entries of a manifest about the source."""
        path = Path(self.origin).expanduser()
        return {
            # An absolute path is valid from any working directory.
            "model": str(path.resolve()) if path.exists() else self.origin,
            "revision": self.revision,
            "file": self.file,
            "state": self.state,
            "family": self.family.name,
            "license": self.license,
            "adapters": list(self.adapters),
            "components": self.components,
        }


def load_source(
    model: str,
    subfolder: str | None = None,
    revision: str | None = None,
    causal: dict[str, Any] | None = None,
    file: str | None = None,
    use_ema: bool | None = None,
    adapters: Sequence[AdapterConfig] = (),
) -> Source:
    """Find `model`, recognize its family, and check names, shapes and dtypes of all its tensors.

    `model` is `zoo:NAME`, a transformer's folder, a pipeline's folder, a Hub ID or a weights file: .safetensors, .pt,
    .pth, .ckpt or .bin, or the .index.json of its shards. A weights file needs config.json beside it unless its shapes
    determine the configuration. `file` names the weights file in a folder or Hub repository. `causal` replaces the
    `causal` section of config.json. `use_ema` chooses between the averaged and the trained weights of a training
    checkpoint; None uses the averaged ones if there are any. `adapters` are added to the tensors as they are read.
    Raises UserError in one line.
    """
    located = locate(model, subfolder, revision, file)
    where = str(located.file or located.folder)
    stored = None if located.config is None else read_config(located.config.parent)
    family = None if stored is None or located.config is None else recognize(stored, located.config)
    tensors = open_weights(located.folder) if located.file is None else open_file(located.file)
    state = find_state(tensors, use_ema, where)
    tensors = tensors.select(state.names)
    if family is None or stored is None or located.config is None:
        family, config, tensors = infer(tensors, where)
    else:
        tensors = in_our_names(family, tensors, where)
        config = in_our_layout(family, stored, tensors, located.config)
    config = accepted_config(family.dense_class, config)
    if causal is not None:
        config["causal"] = causal
    tensors = check_tensors(family.dense_class, config, tensors, where)
    files = [_locate_adapter(adapter, model, located) for adapter in adapters]
    if files:
        names = module_names(tensors, family.original_names(tensors))
        tensors = adapted(tensors, names, [(path, adapter) for (path, _), adapter in zip(files, adapters, strict=True)])
    return Source(
        family,
        config,
        tensors,
        model,
        located.folder,
        _license(located.folder),
        located.revision,
        file,
        state.key,
        adapters=tuple(
            {**adapter.model_dump(), "model": adapter.model or model, "file": path.name, "revision": commit}
            for (path, commit), adapter in zip(files, adapters, strict=True)
        ),
    )


def _locate_adapter(adapter: AdapterConfig, model: str, located: Located) -> tuple[Path, str | None]:
    """The file of an adapter and its commit on the Hub; by default in the model's own folder and commit."""
    if adapter.model is not None:
        return locate_file(adapter.model, adapter.revision, adapter.file, PEFT_CONFIG)
    path = Path(model).expanduser()
    own = str(path.parent) if path.is_file() else model
    if model.startswith("zoo:"):
        own = str(located.folder)
    return locate_file(own, adapter.revision or located.revision, adapter.file, PEFT_CONFIG)


def load_dense(
    source: Source, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> CausalTransformer:
    """The dense causal model of a source, in eval mode; `dtype` None keeps the stored dtypes.

    Raises UserError for a tensor with NaN or infinite values.
    """
    model: CausalTransformer = build_model(source.family.dense_class, source.config, source.tensors, dtype, device)
    model.noise_range = source.noise_range
    return model


def _license(folder: Path) -> str | None:
    """License identifier in the model card of a transformer's folder or of its pipeline."""
    for card in (folder / "README.md", folder.parent / "README.md"):
        if card.is_file():
            try:
                license = (metadata_load(card) or {}).get("license")
            except (ValueError, yaml.YAMLError):
                continue
            if isinstance(license, str):
                return license
    return None
