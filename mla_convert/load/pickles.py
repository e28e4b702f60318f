"""Tensors of the files that `torch.save` writes, mapped and never executed."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .formats import raise_if_unreadable

PICKLES = (".pt", ".pth", ".ckpt", ".bin")

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_REMEDY = "load it where it was made and write its tensors with safetensors.torch.save_file"
# A checkpoint nests its weights two or three deep; a damaged one may contain itself.
_MAX_DEPTH = 4


class PickleFile:
    """A file of `torch.save` whose mappings of tensors are flattened: `generator.model.head.weight`.

    Opening it reads the structure alone, in torch's `weights_only` mode; the data stay in the mapped
    file until a tensor is used. Raises UserError for a file that would have to run code, that is of
    the format before torch 1.6, which cannot be mapped, or that is no such file at all.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as opened:
                archive = zipfile.is_zipfile(opened)
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=True) if archive else None
        except pickle.UnpicklingError as error:
            raise UserError(f"{path} needs code to be run ({_culprit(error)}), which is refused; {_REMEDY}") from None
        # What torch raises for a damaged or hostile archive is not documented.
        except Exception as error:
            raise_if_unreadable(path, error)
            if "TorchScript" in str(error):
                raise UserError(f"{path} is a TorchScript program, not a file of weights; {_REMEDY}") from None
            raise UserError(f"{path} cannot be read ({_first_line(error)}); fetch it again") from None
        if not archive:
            raise_if_unreadable(path, ValueError())
            raise UserError(_not_an_archive(path))
        if not isinstance(value, Mapping):
            raise UserError(f"{path} holds a {type(value).__name__}, not named tensors; {_REMEDY}")
        self._tensors = dict(_flatten(value, "", _MAX_DEPTH))

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype | str:
        dtype = self._tensors[name].dtype
        return dtype if dtype in _FLOATS else str(dtype).removeprefix("torch.")

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach().contiguous()

    def metadata(self) -> dict[str, str]:
        return {}


def _flatten(value: Mapping[Any, Any], prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    for key, entry in value.items():
        if isinstance(entry, Tensor):
            yield f"{prefix}{key}", entry
        elif isinstance(entry, Mapping) and depth > 1:
            yield from _flatten(entry, f"{prefix}{key}.", depth - 1)


def _culprit(error: Exception) -> str:
    """What the pickle wants to call, from torch's long message."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"WeightsUnpickler error: (.+)", str(error))
    return found[1] if found else _first_line(error)


def _not_an_archive(path: Path) -> str:
    with path.open("rb") as opened:
        start = opened.read(2)
    if start == b"PK":
        return f"{path} is cut short; fetch it again"
    # Opcode and version of the pickle protocols 2 to 5.
    if len(start) == 2 and start[0] == 0x80 and start[1] in range(2, 6):
        return f"{path} is in the format before torch 1.6, which cannot be read tensor by tensor; {_REMEDY}"
    return f"{path} is not a file of torch.save; fetch it again or name another file"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
