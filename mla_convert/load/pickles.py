"""Reads the tensors of files written by `torch.save`, by memory mapping and without executing code."""

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
# Checkpoints nest their weights two or three levels deep; a damaged one may contain itself.
_MAX_DEPTH = 4


class PickleFile:
    """A file of `torch.save` with nested mappings flattened to names such as `generator.model.head.weight`.

    Opening it reads only the structure, in torch's `weights_only` mode; data stay in the mapped file until a tensor is
    used. Raises UserError for a file that needs code to be run, for the format before torch 1.6 and a compressed
    archive, which cannot be mapped, and for any other kind of file.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as opened:
                archive = zipfile.is_zipfile(opened)
                if archive and any(entry.compress_type for entry in zipfile.ZipFile(opened).infolist()):
                    raise UserError(f"{path} is compressed, which torch.save never does; {_REMEDY}")
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=True) if archive else None
        except pickle.UnpicklingError as error:
            raise UserError(f"{path} needs code to be run ({_culprit(error)}), which is refused; {_REMEDY}") from None
        except UserError:
            raise
        # The exceptions of torch for a damaged or hostile archive are not documented.
        except Exception as error:
            raise_if_unreadable(path, error)
            if "TorchScript" in str(error):
                raise UserError(f"{path} is a TorchScript program, not a file of weights; {_REMEDY}") from None
            raise UserError(f"{path} cannot be read ({_first_line(error)}); download it again") from None
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


def _flatten(value: Mapping[Any, Any], prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    for key, entry in value.items():
        if isinstance(entry, Tensor):
            yield f"{prefix}{key}", entry
        elif isinstance(entry, Mapping) and depth > 1:
            yield from _flatten(entry, f"{prefix}{key}.", depth - 1)


def _culprit(error: Exception) -> str:
    """The name that the pickle would call, extracted from torch's message, whose first lines advise to allow it."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"WeightsUnpickler error:\s+(\S.*)", str(error))
    return found[1] if found else "it holds more than tensors"


def _not_an_archive(path: Path) -> str:
    with path.open("rb") as opened:
        start = opened.read(2)
    if start == b"PK":
        return f"{path} is truncated; download it again"
    # Opcode and version of the pickle protocols 2 to 5.
    if len(start) == 2 and start[0] == 0x80 and start[1] in range(2, 6):
        return f"{path} is in the format before torch 1.6, which cannot be read tensor by tensor; {_REMEDY}"
    return f"{path} was not written by torch.save; download it again or name another file"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
