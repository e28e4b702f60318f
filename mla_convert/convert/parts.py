"""Store converted layers on disk, one file each, so that a killed conversion resumes where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ..files import atomic_file, explain_os_errors, save_tensors, write_json
from ..load import LazyTensors
from .initialize import LayerInit
from .state import ATTENTION, block_state

FORMAT = 2
IDENTITY = "identity.json"
_PLAN, _TENSORS = "plan", "tensors"


class PartFiles:
    """A `Shelf` of converted blocks in `folder`, with one more file for everything around the blocks.

    `identity` is everything that the bytes depend on; part files with another identity are deleted. `heads` is the
    number of heads of a layer. A layer's file holds the converted block under the model's names, and its header holds
    the other fields of the `LayerInit`. Files are written atomically. Raises UserError for a full disk.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], heads: int) -> None:
        self.folder, self.heads = folder, heads
        stated = {"format": FORMAT, "sha256": _digest(identity)}
        try:
            same = json.loads((folder / IDENTITY).read_text(encoding="utf-8")) == stated
        except (OSError, ValueError):
            same = False
        if not same:
            with explain_os_errors(folder):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            write_json(folder / IDENTITY, stated)

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, int) and self._path(layer).is_file()

    def get(self, layer: int) -> LayerInit:
        """A layer's fit, with tensors in the dtype of the model."""
        with safe_open(self._path(layer), framework="pt") as opened:
            return _plan(opened.metadata(), lambda name: opened.get_tensor(_full_name(layer, name)).clone())

    def outline(self, layer: int) -> LayerInit:
        """A layer's fit without its tensors."""
        with safe_open(self._path(layer), framework="pt") as opened:
            return _outline(opened.metadata())

    def put(self, layer: int, dense: Mapping[str, Tensor], plan: LayerInit) -> None:
        """Write the converted form of a block whose dense state is `dense`."""
        outline = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan) if f.name != "tensors"}
        header = {_PLAN: json.dumps(outline), _TENSORS: json.dumps(sorted(plan.tensors))}
        state = block_state(dense, plan, self.heads)
        named = {f"blocks.{layer}.{name}": tensor for name, tensor in state.items()}
        self._write(layer, named, header)

    def truncate(self, layer: int, rank: int) -> None:
        """Keep only the first `rank` numbers of a layer's latent. Repeating it changes nothing."""
        with safe_open(self._path(layer), framework="pt") as opened:
            header = opened.metadata()
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        shorter = _plan(header, lambda name: tensors[_full_name(layer, name)]).truncated(rank).tensors
        self._write(layer, tensors | {_full_name(layer, name): tensor for name, tensor in shorter.items()}, header)

    def has_surroundings(self) -> bool:
        """Whether the file of everything around the blocks was written."""
        return self._path(None).is_file()

    def put_surroundings(self, tensors: Mapping[str, Tensor]) -> None:
        """Write everything around the blocks."""
        self._write(None, tensors, {})

    def tensors(self, layers: int) -> LazyTensors:
        """All tensors of a model with this number of layers, whose part files must all exist."""
        return LazyTensors.from_files([self._path(layer) for layer in (None, *range(layers))])

    def _write(self, layer: int | None, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        with atomic_file(self._path(layer)) as temporary:
            save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)

    def _path(self, layer: int | None) -> Path:
        return self.folder / ("around.safetensors" if layer is None else f"block-{layer:04d}.safetensors")


def _outline(header: Mapping[str, str]) -> LayerInit:
    return LayerInit(**json.loads(header[_PLAN]), tensors={})


def _plan(header: Mapping[str, str], tensor: Callable[[str], Tensor]) -> LayerInit:
    """The fit described by a header; `tensor` returns a tensor by its name in the attention."""
    plan = _outline(header)
    plan.tensors = {name: tensor(name) for name in json.loads(header[_TENSORS])}
    return plan


def _full_name(layer: int, name: str) -> str:
    return f"blocks.{layer}.{ATTENTION}.{name}"


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
