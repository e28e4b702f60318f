"""Give access to the dense blocks of a model one at a time, from a model in memory or from a source on disk.

On a CPU, blocks run in float32: many CPUs multiply half precision at a tenth of the rate, and the fit then sees no
rounding. On a GPU, blocks run in the dtype they are stored in.
"""

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

from ..families.causal import CausalTransformer
from ..load import Source
from ..load.build import storage_dtype

BLOCKS = "blocks."


class Blocks(Protocol):
    """`model` has everything around the blocks (see `families.base.Family`); `open` gives access to one block."""

    model: CausalTransformer

    def __len__(self) -> int: ...

    def open(self, layer: int) -> AbstractContextManager[Any]:
        """Open block number `layer` with its weights, ready to run until the context ends."""
        ...

    def state(self, layer: int) -> dict[str, Tensor]:
        """The state of a block, in the dtypes of the converted model."""
        ...

    def entered(self) -> None:
        """Free what only `model.enter` needs; called when all clips have entered the model."""
        ...


class ModelBlocks:
    """The blocks of a dense model in memory, on its device."""

    def __init__(self, model: CausalTransformer) -> None:
        self._dense = model
        self._widened = runs_in(model.dtype, model.device) != model.dtype
        self.model = _widened_around(model) if self._widened else model

    def __len__(self) -> int:
        return len(self._dense.blocks)

    @contextlib.contextmanager
    def open(self, layer: int) -> Iterator[Any]:
        block = self._dense.blocks[layer]
        yield copy.deepcopy(block).float() if self._widened else block

    def state(self, layer: int) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self._dense.blocks[layer].state_dict()
        return state

    def entered(self) -> None:
        """Free nothing: the caller owns the model."""


class SourceBlocks:
    """The blocks of a source: a block is read when it is opened, everything around the blocks is read once.

    `dtype` is that of the converted model; None keeps the stored dtypes. Blocks are opened on `device`: in the dtypes
    they run in if `run`, else in those of the converted model. Raises UserError for a tensor with a NaN or an infinity.
    """

    def __init__(
        self,
        source: Source,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        run: bool = True,
    ) -> None:
        self.source, self.dtype, self.device, self.run = source, dtype, torch.device(device), run
        with no_init_weights(), init_empty_weights():
            model = source.family.dense_class.from_config(dict(source.config))
        state = {
            name: self._placeholder(name, tensor) if name.startswith(BLOCKS) else self._read(name)
            for name, tensor in model.state_dict().items()
        }
        model.load_state_dict(state, assign=True)
        for name, child in model.named_children():
            if f"{name}." != BLOCKS:
                # Also moves rotary tables, which no state dict holds.
                child.to(self.device)
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

    def state(self, layer: int) -> dict[str, Tensor]:
        state = {name: self._stored(f"{BLOCKS}{layer}.{name}") for name in self.model.blocks[layer].state_dict()}
        self.source.tensors.release()
        return state

    def entered(self) -> None:
        # Diffusers' name for the embedder of time and text, the largest part around the blocks.
        embedder = getattr(self.model, "condition_embedder", None)
        if embedder is not None:
            embedder.to("meta")
            give_back_memory()

    def around(self) -> dict[str, Tensor]:
        """The state of everything around the blocks, in the dtypes of the converted model."""
        state = self.model.state_dict().items()
        return {name: x.to("cpu", self._dtype(name)) for name, x in state if not name.startswith(BLOCKS)}

    def _dtype(self, name: str) -> torch.dtype:
        return storage_dtype(self.source.family.dense_class, name, self.dtype) or self.source.tensors.dtype(name)

    def _opened_in(self, name: str) -> torch.dtype:
        return runs_in(self._dtype(name), self.device) if self.run else self._dtype(name)

    def _stored(self, name: str) -> Tensor:
        # A copy releases the file, whose tensors need not be aligned.
        return self.source.tensors[name].to(dtype=self._dtype(name), copy=True)

    def _read(self, name: str) -> Tensor:
        # Rounded to the dtype of the converted model first.
        return self._stored(name).to(self.device, self._opened_in(name))

    def _placeholder(self, name: str, tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=self._opened_in(name), device="meta")


def runs_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which blocks stored in `dtype` run on `device`."""
    return torch.float32 if device.type == "cpu" and dtype.itemsize < 4 else dtype


def _widened_around(model: Any) -> Any:
    """Copy `model` with everything around its blocks in float32; the blocks are shared."""
    changed = copy.copy(model)
    changed._modules = {
        name: child if f"{name}." == BLOCKS else copy.deepcopy(child).float() for name, child in model._modules.items()
    }
    changed._parameters = {name: nn.Parameter(x.float(), False) for name, x in model._parameters.items()}
    return changed


def give_back_memory() -> None:
    """Return freed memory to the system where the C library can; glibc keeps it, and it fragments."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def with_attention(block: Any, attention: nn.Module) -> Any:
    """A block that shares everything with `block` except its self-attention."""
    changed = copy.copy(block)
    changed._modules = {**block._modules, "attn1": attention}
    return changed
