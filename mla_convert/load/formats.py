"""Defines the interface of a file of tensors, and implements it for safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LFS_POINTER = b"version https://git-lfs"


class TensorFile(Protocol):
    """Named tensors in one file; only `read` touches their data."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype | str:
        """The dtype if it is 16, 32 or 64-bit floating point, otherwise its name in the file."""
        ...

    def read(self, name: str) -> Tensor:
        """The stored tensor, possibly a view of the mapped file."""
        ...


class SafetensorsFile:
    """A .safetensors file. Raises UserError when it is missing, truncated or in another format."""

    def __init__(self, path: Path) -> None:
        try:
            # Opening checks that the length of the file matches its header.
            self._open: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise_if_unreadable(path, error)
            raise UserError(f"{path} is truncated or not a safetensors file ({error}); download it again") from None

    def names(self) -> list[str]:
        return list(self._open.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype | str:
        stored: str = self._open.get_slice(name).get_dtype()
        return _DTYPES.get(stored, stored)

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._open.get_tensor(name)
        return tensor

    def metadata(self) -> dict[str, str]:
        """Text entries of the header."""
        return self._open.metadata() or {}


def raise_if_unreadable(path: Path, error: Exception) -> None:
    """Raise UserError if `path` is missing, cannot be read or is a git-lfs pointer."""
    if not path.is_file():
        raise UserError(f"{path} is missing") from None
    if isinstance(error, OSError):
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    with path.open("rb") as opened:
        if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(
                f"{path} is a git-lfs pointer, not the weights; run `git lfs pull` in its repository"
            ) from None
