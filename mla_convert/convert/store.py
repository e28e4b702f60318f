"""Store activations between two visits of a block, in memory up to a limit and in files beyond it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UserError
from ..files import explain_os_errors, save_tensors

IN_MEMORY_BYTES = 256 * 2**20
SHARE_OF_DISK = 0.9
_NAME = "tensor"


class TensorStore:
    """Tensors by key, in CPU memory up to `limit` bytes and in files of `folder` beyond that.

    Without a folder, all tensors stay in CPU memory. Tensors are read back on `device`, bit for bit.
    """

    def __init__(
        self, folder: Path | None = None, limit: int = IN_MEMORY_BYTES, device: torch.device | str = "cpu"
    ) -> None:
        self.folder, self.limit, self.device = folder, limit, torch.device(device)
        self._held: dict[str, Tensor] = {}
        self._bytes = 0
        self.clear()

    def __setitem__(self, key: str, tensor: Tensor) -> None:
        self._forget(key)
        size = tensor.numel() * tensor.element_size()
        if self.folder is None or self._bytes + size <= self.limit:
            self._held[key] = tensor.detach().cpu()
            self._bytes += size
            return
        with explain_os_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors({_NAME: tensor.detach().cpu().contiguous()}, self._path(key))

    def __getitem__(self, key: str) -> Tensor:
        if key in self._held:
            return self._held[key].to(self.device)
        # A mapped tensor need not be aligned, which would change the order of sums.
        return load_file(self._path(key))[_NAME].clone().to(self.device)

    def __contains__(self, key: object) -> bool:
        return key in self._held or (self.folder is not None and self._path(str(key)).exists())

    def pop(self, key: str) -> Tensor:
        """Remove a tensor from the store and return it."""
        tensor = self[key]
        self._forget(key)
        return tensor

    def clear(self) -> None:
        """Remove everything, including the files of an earlier process."""
        self._held.clear()
        self._bytes = 0
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def fits(self, size: int) -> bool:
        """Whether `size` bytes fit in memory, or on the disk with a tenth of its free space left over."""
        return self.folder is None or size <= max(self.limit, int(SHARE_OF_DISK * self._free()))

    def require(self, size: int, remedy: str) -> None:
        """Raise UserError with `remedy` if `size` bytes do not fit."""
        if not self.fits(size):
            free = f"nine tenths of the {self._free() / 1e9:.3g} GB free in {self._place()}"
            raise UserError(f"calibration stores {size / 1e9:.3g} GB of hidden states, more than {free}; {remedy}")

    def _place(self) -> Path:
        assert self.folder is not None
        return next(parent for parent in self.folder.parents if parent.exists())

    def _free(self) -> int:
        return shutil.disk_usage(self._place()).free

    def _forget(self, key: str) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self._bytes -= held.numel() * held.element_size()
        elif self.folder is not None:
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"
