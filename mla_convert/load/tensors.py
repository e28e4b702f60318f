"""Tensors of weight files that are read one at a time, when they are asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from .formats import SafetensorsFile, TensorFile
from .pickles import PICKLES, PickleFile


class Place(NamedTuple):
    """Where a tensor lies: the file and its name in there."""

    file: Path
    name: str


class LazyTensors(Mapping[str, Tensor]):
    """Named tensors in one or more files of safetensors or of `torch.save`.

    Looking one up reads it from its file, as it is stored, and raises UserError if it has a NaN or
    an infinity; names, shapes and dtypes come from the headers alone.
    """

    def __init__(self, places: Mapping[str, Place]) -> None:
        self._places = dict(places)
        self._open: dict[Path, TensorFile] = {}

    @classmethod
    def from_files(cls, files: Collection[Path]) -> LazyTensors:
        """Every tensor of every file. Raises UserError for a file that is missing, cut short or cannot be read."""
        tensors = cls({})
        for file in files:
            tensors._places.update({name: Place(file, name) for name in tensors._handle(file).names()})
        return tensors

    def select(self, stored: Mapping[str, str]) -> LazyTensors:
        """The tensors under the names `stored.values()`, called `stored.keys()`."""
        selected = LazyTensors({name: self._places[old] for name, old in stored.items()})
        selected._open = dict(self._open)
        return selected

    @property
    def places(self) -> Mapping[str, Place]:
        """Where every tensor lies."""
        return self._places

    def metadata(self, file: Path) -> dict[str, str]:
        """What the header of one of the files says beside names and shapes."""
        return self._handle(file).metadata()

    def stored_name(self, name: str) -> str:
        """What the file calls a tensor."""
        return self._places[name].name

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape, from the header."""
        file, stored = self._places[name]
        return self._handle(file).shape(stored)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every shape, from the headers."""
        return {name: self.shape(name) for name in self}

    def dtype(self, name: str) -> torch.dtype:
        """Dtype, from the header. Raises UserError for anything but 16, 32 and 64 bit floating point."""
        file, stored = self._places[name]
        dtype = self._handle(file).dtype(stored)
        if isinstance(dtype, str):
            raise UserError(
                f"{file}: tensor {stored} is stored as {dtype}; "
                "quantised weights cannot be converted, use the checkpoint they were made from"
            )
        return dtype

    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted({place.file for place in self._places.values()})

    def release(self) -> None:
        """Close the files, which are opened again when they are needed.

        What was read of a mapped file counts as resident memory until then.
        """
        self._open.clear()

    def __getitem__(self, name: str) -> Tensor:
        file, stored = self._places[name]
        tensor = self._handle(file).read(stored)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise UserError(f"{file}: tensor {name} has {bad} NaN or infinite of {tensor.numel()} values")
        return tensor

    def __contains__(self, name: object) -> bool:
        # Mapping's own would read the tensor.
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _handle(self, file: Path) -> TensorFile:
        if file not in self._open:
            self._open[file] = PickleFile(file) if file.suffix in PICKLES else SafetensorsFile(file)
        return self._open[file]
