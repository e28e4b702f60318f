"""What every op shares: whether Triton is there, what it refuses, how it is launched and compiled ahead of time.

Triton may be missing or broken (macOS, Windows); then `jit` leaves functions alone, `tl` is None and
only the references work.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    TRITON_ERROR = None
except Exception as error:  # a broken installation raises more than ImportError
    triton = tl = None
    TRITON_ERROR = f"Triton cannot be imported: {' '.join(str(error).split())[:200]}"

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_CAPABILITY = 80
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def jit(function: Any = None, **options: Any) -> Any:
    """`triton.jit`, as a decorator with or without options; the plain function where Triton is missing."""
    if function is None:
        return lambda inner: jit(inner, **options)
    return function if triton is None else triton.jit(function, **options)


class Plan(NamedTuple):
    """How a kernel is compiled: its tl.constexpr arguments by name, warps and pipeline stages."""

    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int = 0
    """Registers of a thread that the compiler may take, 0 for as many as there are."""
    described: bool = False
    """Whether full tiles are copied by descriptors, which the launcher makes."""

    def options(self) -> dict[str, Any]:
        """The compiler's options; products and sums are fused into one rounding whatever Triton's default is."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return {**options, "maxnreg": self.max_registers} if self.max_registers else options


class Variant(NamedTuple):
    """One ahead-of-time compilation of a kernel, as it would be launched on the geometry that `name` tells.

    `types` maps arguments to Triton's names of types (`*bf16`, `*i32`, `fp32`); an argument that is neither
    there nor a constant of `plan` is an i32. A tensor that is absent is a constant None. Pointers and
    integers are taken to be multiples of 16, but for those that the kernel names in `do_not_specialize` and `UNEVEN`
    of `aot.py`. `dot` says whether the kernel is expected to use the tensor cores by the instruction of its generation.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    plan: Plan
    dot: bool = True


def why_not(device: str | torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel runs on `device` in `dtype`, in one line; None when kernels run."""
    if TRITON_ERROR is not None:
        return TRITON_ERROR
    if dtype not in DTYPES:
        return f"{dtype} is not supported: float16, bfloat16 or float32"
    kind = torch.device(device).type
    if kind == "cpu" and INTERPRETED:
        return "Triton's interpreter multiplies bfloat16 wrongly" if dtype == torch.bfloat16 else None
    if kind != "cuda":
        return f"kernels run on CUDA devices, not on {kind}"
    if torch.version.hip is not None:
        return "kernels are tuned for NVIDIA devices, this is a ROCm build of torch"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    found = capability(torch.device(device))
    if found < MIN_CAPABILITY:
        return f"compute capability {found / 10:.1f} is not supported: 8.0 or newer"
    return None


def capability(device: torch.device) -> int:
    """Compute capability of a CUDA device as one number, 90 for 9.0; that of the oldest supported one for others."""
    if device.type != "cuda":
        return MIN_CAPABILITY
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tile_family(capability: int) -> int:
    """The table of tiles that a compute capability takes: 90 or 100 for data centre parts, 80 for all others."""
    if capability == 90:
        return 90
    return 100 if 100 <= capability < 120 else 80


def require(condition: bool, message: str, *details: Any) -> None:
    """Raise ValueError with the one-line `message`, formatted with `details`, unless `condition` holds.

    Formatted only then: torch.compile cannot trace f-strings of sizes that it holds dynamic.
    """
    if not condition:
        raise ValueError(message.format(*details))


def refuse(reason: str | None) -> None:
    """Raise NotImplementedError with `reason`, what a `why_not_...` function answered; None passes."""
    if reason is not None:
        raise NotImplementedError(reason)


def check_tensor(
    name: str,
    x: Tensor,
    shape: Sequence[int | None],
    dtype: torch.dtype | None = None,
    like: Tensor | None = None,
) -> None:
    """Raise ValueError unless `x` has `shape` (None: any), `dtype`, the device of `like`, a contiguous last axis."""
    if x.dim() != len(shape) or any(size is not None and size != x.shape[axis] for axis, size in enumerate(shape)):
        sizes = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} is {list(x.shape)}, expected [{sizes}]")
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"{name} is {x.dtype}, expected {dtype}")
    if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"the last axis of {name} must be contiguous")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, expected {like.device}")


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The context in which a kernel is launched on the device of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def launch(kernel: Any, grid: tuple[int, ...], plan: Plan, x: Tensor, *arguments: Any) -> None:
    """Launch `kernel` on the device of `x`; `arguments` are the leading ones, the plan's constants come by name."""
    if 0 in grid:
        return
    with on_device(x):
        kernel[grid](*arguments, **plan.constants, **plan.options())


def ceil_div(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below `n`, at least 1."""
    return 1 << max(0, n - 1).bit_length()


def blocks(channels: int) -> tuple[int, int]:
    """Two powers of two that cover `channels` for `tl.dot`, each at least 16 or, the second, 0: 192 = 128 + 64.

    One block is taken where two would be no smaller: 128 = 128 + 0, 112 = 128 + 0.
    """
    whole = max(16, power_of_two(channels))
    if whole in (16, channels):
        return whole, 0
    rest = max(16, power_of_two(channels - whole // 2))
    return (whole // 2, rest) if whole // 2 + rest < whole else (whole, 0)
