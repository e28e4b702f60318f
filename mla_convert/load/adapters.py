"""Adds low-rank adapters (LoRA, arXiv 2106.09685) to the weights of a source as they are read.

Supported formats: `lora_A` and `lora_B` of peft and diffusers; `lora_down`, `lora_up` and `alpha` of kohya's scripts
and ComfyUI, with their `diff` and `diff_b`; LongLive's `generator_lora`. A weight W becomes
`W + scale (alpha / rank) up down`, computed in float32 and returned in the stored dtype.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ..errors import UserError
from .formats import SafetensorsFile
from .pickles import PICKLES
from .states import LORA, OUTSIDE, unwrapped
from .tensors import LazyTensors
from .weights import read_json

PEFT_CONFIG = "adapter_config.json"
# The key of a file's header under which diffusers stores peft's configuration.
_HEADER = "lora_adapter_metadata"
_PREFIXES = (*OUTSIDE, "base_model", "transformer")
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_")
_MATRIX = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up)(?:\.\w+)?\.weight")
_UP = {"lora_B": True, "lora_up": True, "lora_A": False, "lora_down": False}
_DIFFERENCES = {"diff": "weight", "diff_b": "bias"}
_REMEDY = "merge it where it was trained (merge_and_unload in peft, fuse_lora in diffusers) and convert the result"


class AdapterConfig(BaseModel):
    """Adapters (LoRA) that are added to the source's weights as they are read, multiplied by `scale`.

    `model` is a folder, a weights file or a Hub ID, by default the source's own; `file` names the weights file in it.
    `alpha` is for files that do not give it. If it is not given anywhere, it equals the rank, so the factor is 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str | None = None
    file: str | None = None
    revision: str | None = None
    scale: float = 1.0
    alpha: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _names_a_file(self) -> AdapterConfig:
        if self.model is None and self.file is None:
            raise ValueError("an adapter needs model, file, or both")
        return self


class Change(NamedTuple):
    """The change of one weight: `factor * up @ down`, or `factor * up` without `down`; both name `tensors`."""

    tensors: LazyTensors
    factor: float
    up: str
    down: str | None = None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the change fits a weight of `shape`."""
        up = self.tensors.shape(self.up)
        if self.down is None:
            return up == shape
        down = self.tensors.shape(self.down)
        return up[:1] == shape[:1] and math.prod(up[1:]) == down[0] and math.prod(down[1:]) == math.prod(shape[1:])

    def added_to(self, weight: Tensor) -> Tensor:
        """The changed weight in the dtype of `weight`. Raises UserError for NaN or infinite values."""
        change = self.tensors[self.up].float()
        if self.down is not None:
            change = change.flatten(1) @ self.tensors[self.down].float().flatten(1)
        return (weight.float() + self.factor * change.view(weight.shape)).to(weight.dtype)


class AdaptedTensors(LazyTensors):
    """Tensors whose `changes`, by name, are added when they are read."""

    def __init__(self, tensors: LazyTensors, changes: Mapping[str, list[Change]]) -> None:
        super().__init__(tensors.places)
        self._changes = changes

    def select(self, stored: Mapping[str, str]) -> LazyTensors:
        changes = {name: self._changes[old] for name, old in stored.items() if old in self._changes}
        return AdaptedTensors(super().select(stored), changes)

    def files(self) -> list[Path]:
        adapters = {file for changes in self._changes.values() for change in changes for file in change.tensors.files()}
        return sorted({*super().files(), *adapters})

    def release(self) -> None:
        super().release()
        for changes in self._changes.values():
            for change in changes:
                change.tensors.release()

    def __getitem__(self, name: str) -> Tensor:
        tensor = super().__getitem__(name)
        for change in self._changes.get(name, ()):
            tensor = change.added_to(tensor)
        return tensor


def adapted(
    tensors: LazyTensors, modules: Mapping[str, str], adapters: Collection[tuple[Path, AdapterConfig]]
) -> LazyTensors:
    """`tensors` with the changes in the files of `adapters`; names and shapes are checked from the headers.

    `modules` maps every name that a file may use for a module to our name. Raises UserError for a file that holds
    anything but adapters of these modules.
    """
    changes: dict[str, list[Change]] = {}
    for path, config in adapters:
        for name, change in _read(path, config, modules):
            if name not in tensors or not change.fits(tensors.shape(name)):
                held = f"shape {list(tensors.shape(name))}" if name in tensors else "no such tensor"
                raise UserError(f"{path}: {change.up} does not fit {name}, for which the model has {held}")
            changes.setdefault(name, []).append(change)
    return AdaptedTensors(tensors, changes) if changes else tensors


def module_names(names: Collection[str], others: Mapping[str, str]) -> dict[str, str]:
    """Map module names to ours: our own, those of `others` (another layout's tensors to ours), both also with `_`."""
    table = {_module(name): _module(name) for name in names}
    table |= {_module(theirs): _module(ours) for theirs, ours in others.items()}
    return {name.replace(".", "_"): ours for name, ours in table.items()} | table


def _module(name: str) -> str:
    return name.rpartition(".")[0] or name


def _read(path: Path, config: AdapterConfig, modules: Mapping[str, str]) -> list[tuple[str, Change]]:
    """The changes in a file, with our names of the weights. Raises UserError."""
    stored = LazyTensors.from_files([path])
    chosen = [name for name in stored if name.startswith(f"{LORA}.")] or list(stored)
    pairs: dict[str, dict[bool, str]] = {}
    alphas: dict[str, float] = {}
    changes: list[tuple[str, Change]] = []
    for name in chosen:
        matrix, (module, _, kind) = _MATRIX.fullmatch(name), name.rpartition(".")
        if matrix is not None:
            pairs.setdefault(_ours(path, matrix[1], modules), {})[_UP[matrix[2]]] = name
        elif kind == "alpha":
            alphas[_ours(path, module, modules)] = float(stored[name])
        elif kind in _DIFFERENCES:
            weight = f"{_ours(path, module, modules)}.{_DIFFERENCES[kind]}"
            changes.append((weight, Change(stored, config.scale, name)))
        else:
            raise UserError(f"{path} holds {name}, which is not a plain LoRA and cannot be added; {_REMEDY}")
    if not pairs and not changes:
        raise UserError(f"{path} holds no LoRA weights; name another file in source.adapters")
    settings = _peft_settings(path)
    in_file = next(iter(alphas.values()), settings.alpha)
    if in_file is not None and config.alpha not in (None, in_file):
        raise UserError(
            f"{path} has alpha {in_file:g}, but source.adapters has {config.alpha:g}; leave it out, or use scale"
        )
    for module, pair in pairs.items():
        if len(pair) < 2:
            raise UserError(f"{path} has {next(iter(pair.values()))} without its other half; download it again")
        rank = stored.shape(pair[False])[0]
        alpha = alphas.get(module, settings.alpha or config.alpha or rank)
        factor = config.scale * alpha / (math.sqrt(rank) if settings.root else rank)
        changes.append((f"{module}.weight", Change(stored, factor, pair[True], pair[False])))
    return changes


def _ours(path: Path, module: str, modules: Mapping[str, str]) -> str:
    """Our name of a module. Raises UserError for one that the model does not have."""
    bare = unwrapped(module.removeprefix(f"{LORA}."), _PREFIXES)
    for prefix in _FLAT_PREFIXES:
        bare = bare.removeprefix(prefix)
    if bare not in modules:
        raise UserError(
            f"{path} adapts {module}, which the model does not have; give an adapter that was trained for this model"
        )
    return modules[bare]


class _PeftSettings(NamedTuple):
    """peft's settings: alpha, and whether it is divided by the root of the rank (rsLoRA, arXiv 2312.03732)."""

    alpha: float | None = None
    root: bool = False


def _peft_settings(path: Path) -> _PeftSettings:
    """The settings beside a file or in its header. Raises UserError for anything but a plain LoRA."""
    beside = path.with_name(PEFT_CONFIG)
    header = None if path.suffix in PICKLES else SafetensorsFile(path).metadata().get(_HEADER)
    if beside.is_file():
        config, where = read_json(beside), str(beside)
    elif header is not None:
        config, where = _from_header(path, header), str(path)
    else:
        return _PeftSettings()
    odd = [key for key in ("use_dora", "fan_in_fan_out", "alpha_pattern", "lora_bias") if config.get(key)]
    if odd or config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{where} sets {', '.join(odd) or config['peft_type']}, which cannot be added; {_REMEDY}")
    return _PeftSettings(config.get("lora_alpha"), bool(config.get("use_rslora")))


def _from_header(path: Path, header: str) -> dict[str, Any]:
    try:
        found = json.loads(header)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path}: {_HEADER} in its header is not a JSON object; download it again")
    return {key.removeprefix("transformer."): value for key, value in found.items()}
