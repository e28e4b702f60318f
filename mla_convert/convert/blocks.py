"""The dense blocks of a model, one at a time: of a model in memory, or read from a source and let go."""

from __future__ import annotations

import contextlib
import copy
import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import no_init_weights
from torch import Tensor, nn

from ..load import Source
from ..load.build import storage_dtype

BLOCKS = "blocks."


class Blocks(Protocol):
    """`model` has everything around the blocks (see `families.base.Family`); `open` gives one of them."""

    model: Any

    def __len__(self) -> int: ...

    def open(self, layer: int) -> AbstractContextManager[Any]:
        """Block number `layer` with its weights, for as long as the context lasts."""
        ...


class ModelBlocks:
    """The blocks of a dense model that is in memory anyway."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __len__(self) -> int:
        return len(self.model.blocks)

    @contextlib.contextmanager
    def open(self, layer: int) -> Iterator[Any]:
        yield self.model.blocks[layer]


class SourceBlocks:
    """The blocks of a source: what is around them is read once, a block when it is opened.

    `dtype` None keeps the stored dtypes. Raises UserError for a tensor with a NaN or an infinity.
    """

    def __init__(self, source: Source, dtype: torch.dtype | None = None) -> None:
        self.source, self.dtype = source, dtype
        with no_init_weights(), init_empty_weights():
            model = source.family.dense_class.from_config(dict(source.config))
        state = {
            name: self._unread(name, tensor) if name.startswith(BLOCKS) else self._read(name)
            for name, tensor in model.state_dict().items()
        }
        model.load_state_dict(state, assign=True)
        source.tensors.release()
        self.model = model.eval().requires_grad_(False)
        self.model.noise_range = source.noise_range

    def __len__(self) -> int:
        return len(self.model.blocks)

    @contextlib.contextmanager
    def open(self, layer: int) -> Iterator[Any]:
        block = self.model.blocks[layer]
        names = list(block.state_dict())
        try:
            block.load_state_dict({name: self._read(f"{BLOCKS}{layer}.{name}") for name in names}, assign=True)
            # Pages of a mapped file count as resident until it is closed.
            self.source.tensors.release()
            yield block
        finally:
            block.to("meta")
            give_back_memory()

    def _dtype(self, name: str) -> torch.dtype:
        return storage_dtype(self.source.family.dense_class, name, self.dtype) or self.source.tensors.dtype(name)

    def _read(self, name: str) -> Tensor:
        # The copy lets go of the file, whose tensors need not be aligned.
        return self.source.tensors[name].to(dtype=self._dtype(name), copy=True)

    def _unread(self, name: str, tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=self._dtype(name), device="meta")


def give_back_memory() -> None:
    """Return freed memory to the system where the C library can; glibc keeps it and its holes grow."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def with_attention(block: Any, attention: nn.Module) -> Any:
    """A block that shares everything with `block` but its self-attention."""
    changed = copy.copy(block)
    changed._modules = {**block._modules, "attn1": attention}
    return changed
