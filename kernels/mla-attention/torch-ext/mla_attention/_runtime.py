"""Shared by all ops: the Triton import, support and argument checks, and launches.

Triton may be missing or broken (macOS, Windows). Then `jit` returns functions unchanged, `tl` is None and only the
references work.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix

try:
    import triton
    import triton.language as tl

    TRITON_ERROR = None
except Exception as error:  # a broken installation raises other errors than ImportError
    triton = tl = None
    TRITON_ERROR = f"Triton cannot be imported: {' '.join(str(error).split())[:200]}"

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_CAPABILITY = 80
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def jit(function: Any = None, **options: Any) -> Any:
    """`triton.jit` as a decorator, with or without options. Returns the plain function if Triton is missing."""
    if function is None:
        return lambda inner: jit(inner, **options)
    return function if triton is None else triton.jit(function, **options)


class Plan(NamedTuple):
    """How a kernel is compiled: its tl.constexpr arguments by name, number of warps and pipeline stages."""

    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int = 0
    """Limit on registers per thread; 0 for no limit."""
    described: bool = False
    """Whether the TMA copies full tiles, using descriptors that the launcher creates."""

    def options(self) -> dict[str, Any]:
        """Compiler options. Fusion of multiply-adds is always on, whatever Triton's default is."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return {**options, "maxnreg": self.max_registers} if self.max_registers else options


def why_not(device: str | torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel runs on `device` in `dtype`, in one line; None if kernels run."""
    if TRITON_ERROR is not None:
        return TRITON_ERROR
    if dtype not in DTYPES:
        return f"{dtype} is not supported; use float16, bfloat16 or float32"
    kind = torch.device(device).type
    if kind == "cpu" and INTERPRETED:
        return "Triton's interpreter gets bfloat16 wrong; use float32" if dtype == torch.bfloat16 else None
    if kind != "cuda":
        return f"kernels run on CUDA devices, not on {kind}"
    if torch.version.hip is not None:
        return "kernels need an NVIDIA GPU, but this is a ROCm build of torch"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    found = capability(torch.device(device))
    if found < MIN_CAPABILITY:
        return f"compute capability {found / 10:.1f} is not supported; kernels need 8.0 or newer"
    return None


def why_not_dtype(op: str, dtype: torch.dtype | None) -> str | None:
    """Why `op` does not support a dtype, in one line; None if it does or there is none."""
    if dtype is None or dtype in DTYPES:
        return None
    return f"{op}: {dtype} is not supported; use float16, bfloat16 or float32"


def lacking(environment: Mapping[str, str] = os.environ) -> str | None:
    """What Triton lacks to compile the launchers of its kernels, in C, in one line; None if nothing is missing.

    Launchers that it has compiled before are in its cache and need neither.
    """
    missing = []
    if not environment.get("CC") and shutil.which("gcc") is None and shutil.which("clang") is None:
        missing.append("no C compiler (gcc or clang)")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        missing.append(f"no {header}")
    if not missing:
        return None
    return f"Triton cannot compile its launchers: {', '.join(missing)}; install gcc and python3-dev"


def capability(device: torch.device) -> int:
    """Compute capability of a CUDA device as one number (90 for 9.0). Returns the minimum, 80, for other devices."""
    if device.type != "cuda":
        return MIN_CAPABILITY
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tile_family(capability: int) -> int:
    """Key of the tile tables for a compute capability: 90 or 100 for data center GPUs, 80 for all others."""
    if capability == 90:
        return 90
    return 100 if 100 <= capability < 120 else 80


def require(condition: bool, message: str, *details: Any) -> None:
    """Raise ValueError with the one-line `message`, formatted with `details`, unless `condition` holds.

    The message is formatted only on failure: torch.compile cannot trace f-strings of dynamic sizes.
    """
    if not condition:
        raise ValueError(message.format(*details))


def refuse(reason: str | None) -> None:
    """Raise NotImplementedError with `reason`, the result of a `why_not_...` function, unless it is None."""
    if reason is not None:
        raise NotImplementedError(reason)


def check_tensor(
    name: str,
    x: Tensor,
    shape: Sequence[int | None],
    dtype: torch.dtype | None = None,
    like: Tensor | None = None,
) -> None:
    """Raise ValueError unless `x` has `shape` (None: any), `dtype`, the device of `like` and a contiguous last axis."""
    if x.dim() != len(shape) or any(size is not None and size != x.shape[axis] for axis, size in enumerate(shape)):
        sizes = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} is {list(x.shape)}, expected [{sizes}]")
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"{name} is {x.dtype}, expected {dtype}")
    if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"the last axis of {name} must be contiguous")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, expected {like.device}")


def define(name: str, schema: str, run: Any, reference: Any, fake: Any, mutates: Sequence[str] = ()) -> Any:
    """Register the op `name`: `run` on CUDA and in the interpreter, else `reference` on a CPU; `fake` gives shapes."""
    op = torch.library.custom_op(
        add_op_namespace_prefix(name), run, mutates_args=mutates, device_types="cuda", schema=schema
    )
    op.register_kernel("cpu")(run if INTERPRETED else reference)
    op.register_fake(fake)
    return op


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context that makes the device of `x` the current one for a launch."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def launch(kernel: Any, grid: tuple[int, ...], plan: Plan, x: Tensor, *arguments: Any) -> None:
    """Launch `kernel` on the device of `x` with `arguments` first and the constants of `plan` by name."""
    if 0 in grid:
        return
    with on_device(x):
        kernel[grid](*arguments, **plan.constants, **plan.options())


def ceil_div(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n` and at least 1."""
    return 1 << max(0, n - 1).bit_length()


def blocks(channels: int) -> tuple[int, int]:
    """Two powers of two that cover `channels` for `tl.dot`, e.g. 192 = 128 + 64.

    The first is at least 16; the second is at least 16 or 0. A single block is used if two would not be smaller:
    128 = 128 + 0, 112 = 128 + 0.
    """
    whole = max(16, power_of_two(channels))
    if whole in (16, channels):
        return whole, 0
    rest = max(16, power_of_two(channels - whole // 2))
    return (whole // 2, rest) if whole // 2 + rest < whole else (whole, 0)
