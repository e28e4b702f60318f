"""A simulated GPU: tensors that claim to be on `cuda` but compute on the CPU.

Inside `pretended()` factories take `device="cuda"`, `.to("cuda")` moves, and what a GPU refuses is refused: an
operation on tensors of both devices, a CPU generator for a draw on the device, `.numpy()`. So a test sees a tensor
that was left on the wrong device without a GPU. Kernels, streams and speed are not simulated.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import PartialState
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU, META = torch.device("cuda", 0), torch.device("meta")
aten = torch.ops.aten
# Index tensors and what is copied may be on the CPU.
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
RUN = threading.Thread.run
ENGINE = torch.autograd.graph._engine_run_backward
GROUPED = torch._C._group_tensors_by_device_and_dtype
LAZY = {aten._conj.default: aten.conj_physical.default, aten._neg_view.default: aten.neg.default}
MOVES = {aten._to_copy.default, aten.copy_.default, aten.copy.default}


class GpuTensor(torch.Tensor):
    """A tensor that claims to be on the GPU; `value` is its content, on the CPU."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> GpuTensor:
        shape = {"strides": value.stride(), "storage_offset": value.storage_offset(), "dtype": value.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, value.shape, device="meta", **shape)
        made.value = value
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:
        return GPU

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_meta(self) -> bool:
        return False

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *_: Any) -> Any:
        return self.numpy()

    def __repr__(self) -> str:
        return f"GpuTensor({self.value!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = GpuTensor(self.value.clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.value.__reduce_ex__(protocol)

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


def leaves(tree: Any) -> list[Any]:
    """The leaves of nested tuples, lists and dicts; torch's own function is more general and slower."""
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, tuple | list):
        return [tree]
    return [leaf for part in tree for leaf in leaves(part)]


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: mapped(function, part) for key, part in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)([mapped(function, part) for part in tree])
    return function(tree)


def on_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def dispatched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the inner values; the result claims the device that it would have on a GPU."""
    tensors = [x for x in leaves((args, kwargs)) if isinstance(x, Tensor)]
    inside = [x for x in tensors if isinstance(x, GpuTensor)]
    asked = kwargs.get("device")
    if asked == META and (func is aten.scalar_tensor.default or torch._C._current_graph_task_id() >= 0):
        # A number, or a gradient of zeros, which C++ makes where it believes the others to be.
        asked, kwargs = GPU, {**kwargs, "device": GPU}
    if func is aten._fused_sdp_choice.default:
        return 0
    here = on_gpu(asked) or (bool(inside) and asked is None)
    # A value cannot say that it is to be conjugated or negated when it is read.
    func = LAZY.get(func, func)
    if func is aten.copy_.default:
        here = isinstance(args[0], GpuTensor)
    if here and func not in MOVES:
        checked = args[:1] if func in INDEXED else (args, kwargs)
        plain = [x for x in leaves(checked) if isinstance(x, Tensor) and not isinstance(x, GpuTensor)]
        strays = [x for x in plain if x.dim() or x.is_meta]
        if strays:
            raise RuntimeError(f"{func}: expected all tensors on cuda:0, but found one on {strays[0].device}")
    if on_gpu(asked):
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != "cuda":
            raise RuntimeError(f"{func}: expected a 'cuda' generator but found 'cpu'")
        kwargs = {**kwargs, "device": torch.device("cpu")}

    def inner(x: Any) -> Any:
        return x.value if isinstance(x, GpuTensor) else x

    result = func(*mapped(inner, args), **mapped(inner, kwargs))
    known = {id(x.value): x for x in inside}

    def outer(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        # What was changed in place is the tensor that was given.
        return known[id(x)] if id(x) in known else GpuTensor(x)

    return mapped(outer, result) if here else result


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Replaces functions that query a driver, or read a device below Python, where a `GpuTensor` is on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.to:
            return _moved(*args, **kwargs)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], GpuTensor):
            args = (args[0], _index(args[1]), *args[2:])
        if func == torch.Tensor.data.__set__ and isinstance(args[0], GpuTensor) != isinstance(args[1], GpuTensor):
            new = args[1].detach()
            is_parameter = isinstance(args[0], torch.nn.Parameter)
            torch.utils.swap_tensors(args[0], torch.nn.Parameter(new, args[0].requires_grad) if is_parameter else new)
            return None
        if func is torch.Tensor.tolist:
            return torch.Tensor.tolist(args[0].cpu())
        if func is torch.Tensor.cuda:
            return _moved(args[0], GPU)
        if func in (torch.tensor, torch.as_tensor) and on_gpu(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": None}).to(GPU)
        return func(*args, **kwargs)


def _index(index: Any) -> Any:
    """An index with tensors in place of lists; C++ would create them on the device that the indexed tensor claims."""
    if isinstance(index, tuple):
        return tuple(_index(part) for part in index)
    return torch.tensor(index, dtype=None if index else torch.long) if isinstance(index, list) else index


def _moved(x: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    """`x.to(...)`."""
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    device = x.device if device is None else GPU if on_gpu(device) else device
    dtype = dtype or x.dtype
    if not copy and (device, dtype) == (x.device, x.dtype):
        return x
    return torch.ops.aten._to_copy(x, device=device, dtype=dtype)


def _backward(*args: Any, **kwargs: Any) -> Any:
    """A backward pass, in which checkpoints recompute; the function that called it has left `_Functions`."""
    with _Functions():
        return ENGINE(*args, **kwargs)


def _grouped(lists: Any, with_indices: bool = False) -> dict[Any, Any]:
    """`torch._C._group_tensors_by_device_and_dtype` by the devices that tensors say they are on."""
    found = GROUPED(lists, with_indices)
    devices = {key: next(x.device for x in group[0][0] if x is not None) for key, group in found.items()}
    return {(devices[key], key[1]): group for key, group in found.items()}


def _started(self: threading.Thread) -> None:
    """`threading.Thread.run`; the modes of torch belong to a thread."""
    with _Functions(), _Dispatch():
        RUN(self)


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """Simulate a GPU, for tensors only."""
    PartialState._reset_state()
    with (
        patch("threading.Thread.run", _started),
        patch("torch.cuda._lazy_init", lambda: None),
        patch("torch._C._group_tensors_by_device_and_dtype", _grouped),
        patch("torch.autograd._engine_run_backward", _backward),
        # A module that moves keeps its parameters, as on a GPU.
        patch("torch.__future__._swap_module_params_on_conversion", True),
        patch.object(PartialState, "default_device", GPU),
        _Functions(),
        _Dispatch(),
    ):
        try:
            yield
        finally:
            PartialState._reset_state()
