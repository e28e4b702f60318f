"""Reads the tensors of weight files lazily, one at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..finite import all_finite
from .formats import SafetensorsFile, TensorFile
from .pickles import PICKLES, PickleFile


class Place(NamedTuple):
    """Where a tensor is stored: the file and the name in it."""

    file: Path
    name: str


class LazyTensors(Mapping[str, Tensor]):
    """Named tensors in one or more files of safetensors or `torch.save`.

    Access by name reads the tensor from its file in its stored dtype, and raises UserError if it has NaN or infinite
    values. Names, shapes and dtypes come from the headers.
    """

    def __init__(self, places: Mapping[str, Place]) -> None:
        self._places = dict(places)
        self._open: dict[Path, TensorFile] = {}

    @classmethod
    def from_files(cls, files: Collection[Path]) -> LazyTensors:
        """Every tensor of every file. Raises UserError for a file that is missing, truncated or unreadable."""
        tensors = cls({})
        for file in files:
            tensors._places.update({name: Place(file, name) for name in tensors._handle(file).names()})
        return tensors

    def select(self, stored: Mapping[str, str]) -> LazyTensors:
        """The tensors `stored.values()`, renamed to `stored.keys()`."""
        selected = LazyTensors({name: self._places[old] for name, old in stored.items()})
        selected._open = dict(self._open)
        return selected

    @property
    def places(self) -> Mapping[str, Place]:
        """Where every tensor is stored."""
        return self._places

    def stored_name(self, name: str) -> str:
        """The name of a tensor in its file."""
        return self._places[name].name

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape, from the header."""
        file, stored = self._places[name]
        return self._handle(file).shape(stored)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every shape, from the headers."""
        return {name: self.shape(name) for name in self}

    def dtype(self, name: str) -> torch.dtype:
        """Dtype, from the header. Raises UserError for anything but 16, 32 and 64-bit floating point."""
        file, stored = self._places[name]
        dtype = self._handle(file).dtype(stored)
        if isinstance(dtype, str):
            raise UserError(
                f"{file}: tensor {stored} is stored as {dtype}, and quantized weights cannot be converted; use the "
                "checkpoint they were made from"
            )
        return dtype

    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted({place.file for place in self._places.values()})

    def release(self) -> None:
        """Close the files; they are reopened when needed.

        Until then, the parts of a mapped file that were read count as resident memory.
        """
        self._open.clear()

    def __getitem__(self, name: str) -> Tensor:
        file, stored = self._places[name]
        tensor = self._handle(file).read(stored)
        if tensor.is_floating_point() and not all_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise UserError(f"{file}: tensor {name} has {bad} NaN or infinite values out of {tensor.numel()}")
        return tensor

    def __contains__(self, name: object) -> bool:
        # Mapping's default would read the tensor.
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _handle(self, file: Path) -> TensorFile:
        if file not in self._open:
            self._open[file] = PickleFile(file) if file.suffix in PICKLES else SafetensorsFile(file)
        return self._open[file]
