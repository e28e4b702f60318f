"""Reads a checkpoint of torch.distributed.checkpoint without executing code; torch's own reader unpickles anything."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from ..errors import UserError

# What the metadata of tensors and plain values are made of.
_PLACES = "torch.distributed.checkpoint.metadata"
_KNOWN = {
    *((_PLACES, name) for name in ("Metadata", "StorageMeta", "MetadataIndex", "TensorProperties")),
    *((_PLACES, name) for name in ("TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata")),
    (_PLACES, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


class ShardReader(dcp.FileSystemReader):
    """Reads shards; raises UserError for metadata that need other code than that of their own classes."""

    def read_metadata(self, *_: Any, **__: Any) -> Any:
        with (Path(self.path) / ".metadata").open("rb") as file:
            _Metadata(file).load()
        return super().read_metadata()


class ShardPlanner(dcp.DefaultLoadPlanner):
    """Loads values that are no tensors; raises UserError if they are not plain."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        try:
            torch.save(torch.load(value, weights_only=True), plain)
        except pickle.UnpicklingError:
            raise _refused(read_item.dest_index.fqn) from None
        plain.seek(0)
        super().load_bytes(read_item, plain)


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _KNOWN:
            raise _refused(f"{module}.{name}")
        return super().find_class(module, name)


def _refused(what: str) -> UserError:
    return UserError(
        f"a checkpoint in shards needs code to be run ({what}), which is refused; train the stage again in a new folder"
    )
