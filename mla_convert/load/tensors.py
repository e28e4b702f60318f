"""Tensors of safetensors files that are read one at a time, when they are asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LFS_POINTER = b"version https://git-lfs"


class Place(NamedTuple):
    """Where a tensor lies: the file and its name in there."""

    file: Path
    name: str


class LazyTensors(Mapping[str, Tensor]):
    """Named tensors in one or more safetensors files.

    Looking one up reads it from its file, as it is stored, and raises UserError if it has a NaN or
    an infinity; names, shapes and dtypes come from the headers alone.
    """

    def __init__(self, places: Mapping[str, Place]) -> None:
        self._places = dict(places)
        self._open: dict[Path, Any] = {}

    @classmethod
    def from_files(cls, files: Collection[Path]) -> LazyTensors:
        """Every tensor of every file. Raises UserError for a file that is missing, cut short or no safetensors."""
        tensors = cls({})
        for file in files:
            names = tensors._handle(file).keys()
            tensors._places.update({name: Place(file, name) for name in names})
        return tensors

    def select(self, stored: Mapping[str, str]) -> LazyTensors:
        """The tensors under the names `stored.values()`, called `stored.keys()`."""
        return LazyTensors({name: self._places[old] for name, old in stored.items()})

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape, from the header."""
        return tuple(self._slice(name).get_shape())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every shape, from the headers."""
        return {name: self.shape(name) for name in self}

    def dtype(self, name: str) -> torch.dtype:
        """Dtype, from the header. Raises UserError for anything but 16, 32 and 64 bit floating point."""
        stored = self._slice(name).get_dtype()
        if stored not in _DTYPES:
            raise UserError(
                f"{self._places[name].file}: tensor {name} is stored as {stored}; "
                "quantised weights cannot be converted, use the checkpoint they were made from"
            )
        return _DTYPES[stored]

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
        tensor: Tensor = self._handle(file).get_tensor(stored)
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

    def _slice(self, name: str) -> Any:
        file, stored = self._places[name]
        return self._handle(file).get_slice(stored)

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            try:
                # Opening checks that the file is as long as its header says.
                self._open[file] = safe_open(file, framework="pt")
            except FileNotFoundError:
                raise UserError(f"{file} is missing") from None
            except (SafetensorError, OSError) as error:
                raise UserError(_unreadable(file, error)) from None
        return self._open[file]


def _unreadable(file: Path, error: Exception) -> str:
    if file.is_file():
        with file.open("rb") as opened:
            if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
                return f"{file} is a git-lfs pointer, not the weights; run `git lfs pull` in its repository"
    if isinstance(error, OSError):
        return f"cannot read {file}: {error.strerror or error}"
    return f"{file} is cut short or not a safetensors file ({error}); fetch it again"
