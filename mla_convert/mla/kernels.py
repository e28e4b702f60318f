"""Chooses how each layer attends while a model streams: fused kernels (absorbed or expanded) or plain torch.

The rule is explicit: operations, weighted by the committed costs of the device (`costs.py`). The reasons against a path
are kept as text, to be printed and recorded. The kernels are in the package `mla_attention`, shipped beside this one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError, lacks_memory
from . import costs, fused
from .attention import AttentionPass, CausalSelfAttention
from .kernel_settings import History, KernelSettings, Mode
from .plain import changed_module

logger = logging.getLogger(__name__)

CHECK = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest allowed difference from torch at the first use of a kernel, relative to the largest output."""

FREE_SHARE = 0.5
"""Share of the device's free memory that expanded histories may take with `history` auto."""

CPU_DEFAULT = "on a CPU torch is the default"
FLOAT32_DEFAULT = "in float32 torch is the default: the kernels are written for tensor cores in 16 bits"


class Shape(NamedTuple):
    """The inputs of a choice: `queries` of a chunk and `keys` of the whole window, in tokens; the kind of cache.

    `device` has its number, as in cuda:1, because the GPUs of a machine may differ.
    `changed` names a module that does more than its weights say, while kernels read only these; empty if there is none.
    """

    batch: int
    queries: int
    keys: int
    dtype: torch.dtype
    device: str
    cache: str
    changed: str = ""


class Choice(NamedTuple):
    """The path and backend of one layer, and why the other paths were not taken."""

    path: fused.Path | Literal["torch"]
    refused: dict[str, str]
    backend: fused.Backend = "attend"


@dataclass
class Findings:
    """What was chosen while a model streamed.

    `choices` are keyed by layer and shape. `checked` holds the layers and shapes, with or without history, whose output
    agreed with torch's; a last True: so did rows written that the output does not depend on. `failed` has, by kind, the
    reason why kernels failed, which are not tried again; the kind None is all of them. `kept` is the decision about
    histories and its reason. `announced`: the choices were logged.
    """

    choices: dict[tuple[int, Shape], Choice] = field(default_factory=dict)
    checked: set[tuple[int, Shape, bool, bool]] = field(default_factory=set)
    failed: dict[Hashable, str] = field(default_factory=dict)
    kept: tuple[str, str] | None = None
    announced: bool = False


class Kernels:
    """How a model attends while it streams without gradients: the `settings`, and in `found` the choices made."""

    def __init__(self, mode: Mode = "auto", history: History = "auto", cuda_graph: bool = True) -> None:
        self.settings = KernelSettings(mode, history, cuda_graph)
        self.found = Findings()
        self.left_free = 0

    def leave_free(self, size: int) -> None:
        """Reserve `size` bytes of the free memory for other work while the model streams; 0 ends that."""
        self.left_free = size

    def forget(self) -> None:
        """Choose and compare anew, as all processes of a group have to from the same pass on."""
        self.found = Findings()

    def takes(self, layer: CausalSelfAttention, tokens: Tensor, step: AttentionPass) -> tuple[int, Shape] | None:
        """The key of a layer's choice in a pass over `tokens` `[B, S, C]` if that is a kernel; None if torch attends.

        Raises UserError in mode `triton` for a layer without a kernel.
        """
        if self.settings.mode == "torch" or step.cache is None or torch.is_grad_enabled():
            return None
        key = self._choose(layer, tokens, step)
        choice = self.found.choices[key]
        if choice.path == "torch" and self.settings.mode == "triton":
            reasons = "; ".join(dict.fromkeys(choice.refused.values()))
            raise UserError(
                f"no kernel for the attention of layer {layer.layer} ({reasons}); set kernels: auto to let torch attend"
            )
        return None if choice.path == "torch" else key

    def _choose(self, layer: CausalSelfAttention, hidden_states: Tensor, step: AttentionPass) -> tuple[int, Shape]:
        """The key of a layer's choice; makes the choice if there is none yet."""
        assert step.cache is not None
        batch, tokens = hidden_states.shape[:2]
        queries = tokens if step.share is None else sum(step.share.sizes)
        rows, _, bits = step.cache.kept(layer.row_layer)
        kind = ", ".join(map(str, (type(step.cache).__name__, rows.dtype, *([bits] if bits else []))))
        keys = rows.shape[1:-1].numel()
        # Adapters and hooks come and go while a model streams.
        changed = changed_module(layer) or ""
        shape = Shape(batch, queries, keys, hidden_states.dtype, str(hidden_states.device), kind, changed)
        key = (layer.layer, shape)
        if key not in self.found.choices:
            choice = choose(layer, shape, step, self.settings.mode, costs.for_device(hidden_states.device))
            failed = self.found.failed.get(None) or self.found.failed.get(_kind(layer, shape, choice))
            if choice.path != "torch" and failed is not None:
                choice = _by_torch(choice, failed)
            self.found.choices[key] = choice
        return key

    @torch._disable_dynamo
    def attention(self, layer: CausalSelfAttention, hidden_states: Tensor, step: AttentionPass) -> Tensor | None:
        """`layer.attention` computed by kernels, `[B, S, H * V]`; None where torch has to compute it.

        Only for a layer that `takes` kernels in this pass. A compiled block calls this between its graphs.
        """
        key: tuple[int, Shape] = step.choice
        choice, shape = self.found.choices[key], key[1]
        assert step.cache is not None and choice.path != "torch"
        if choice.path == "expand" and step.cache.expanded.keep is None:
            step.cache.expanded.keep = self._keeps(layer, shape, step)
        # Other kernels run without history than with it; the batch size changes nothing.
        unread = fused.writes_unread(layer, step)
        check = (layer.layer, shape._replace(batch=1), step.views[0].has_history, unread)
        if self.settings.mode == "triton":
            try:
                return fused.attention(layer, hidden_states, step, choice.path, choice.backend)
            except Exception as error:
                if lacking := fused.lacking(error):
                    raise UserError(f"{lacking}, or set kernels: auto to let torch attend") from None
                raise
        if check in self.found.checked:
            return fused.attention(layer, hidden_states, step, choice.path, choice.backend)
        out = self._compared(key, layer, hidden_states, step)
        if out is not None:
            self.found.checked.add(check)
        return out

    def _compared(
        self, key: tuple[int, Shape], layer: CausalSelfAttention, hidden_states: Tensor, step: AttentionPass
    ) -> Tensor | None:
        """A kernel's output if it agrees with torch's; if it fails or differs, None, and torch attends from now on.

        Rows written are compared where the output does not depend on them, and torch's stay in the cache. If torch's
        output is all zeros or not finite, as for NaN input, None for this pass, and the next one compares again.
        Processes that share a chunk judge alike. Raises UserError if a kernel fails in one, because the others already
        wait for its results.
        """
        choice = self.found.choices[key]
        assert choice.path != "torch"
        try:
            out = fused.attention(layer, hidden_states, step, choice.path, choice.backend)
            written = _own_rows(step) if fused.writes_unread(layer, step) else None
        except Exception as error:
            # Lack of memory is no fault of the kernel, which may fit when less is in memory.
            if lacks_memory(error):
                raise
            self._failed(key, layer, step, error)
            return None
        try:
            expected = layer.eager_attention(hidden_states, step).float()
        except Exception as error:
            if not lacks_memory(error) or step.share is not None:
                raise
            # Torch's attention takes more memory than the kernel's.
            logger.warning(
                "kernels: torch's attention of layer %d does not fit in memory, so nothing is compared", layer.layer
            )
            return out
        largest, difference, apart = _distances(out, expected, written, step)
        if largest == 0 or not math.isfinite(largest):
            return None
        difference /= largest
        # NaN is not below the limit either.
        limit = CHECK[key[1].dtype]
        if not difference <= limit:
            reason = f"{choice.path} differs from torch by {difference:.1e} of the largest output"
        elif not apart <= limit:
            reason = f"the rows written differ from torch's by {apart:.1e} of the largest number"
        else:
            return out
        self._give_up(key, reason, f"layer {layer.layer}")
        return None

    def _failed(
        self, key: tuple[int, Shape], layer: CausalSelfAttention, step: AttentionPass, error: Exception
    ) -> None:
        """Leave what a kernel failed to compute to torch; raises UserError where processes share the chunk."""
        choice, lacking = self.found.choices[key], fused.lacking(error)
        reason = lacking or f"{choice.path} failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if step.share is not None:
            raise UserError(f"kernels: {reason}; on several GPUs set kernels: torch (--kernels torch)") from error
        # What does not compile for one layer does not for the others.
        self.found.failed[None if lacking else _kind(layer, key[1], choice)] = reason
        self._give_up(key, reason, "every layer" if lacking else f"layer {layer.layer} and others of its shape")

    def _give_up(self, key: tuple[int, Shape], reason: str, where: str) -> None:
        """Let torch attend instead of a choice from now on, and say so."""
        self.found.choices[key] = _by_torch(self.found.choices[key], reason)
        logger.warning("kernels: torch attends in %s from now on: %s", where, reason)

    def _keeps(self, layer: CausalSelfAttention, shape: Shape, step: AttentionPass) -> bool:
        """Whether every layer keeps its expanded history for the passes of a chunk, by the setting `history`."""
        if self.settings.history != "auto":
            self.found.kept = (self.settings.history, "as requested")
            return self.settings.history == "chunk"
        assert step.cache is not None
        rows = step.cache.rows
        device = rows[0].device
        free = free_memory(device)
        if free is None:
            self.found.kept = ("pass", f"the free memory of a {device.type} device is unknown")
            return False
        tokens = shape.batch * shape.keys * step.count(layer)
        needed = tokens * (layer.expansion.key + layer.expansion.value) * shape.dtype.itemsize * len(rows)
        keeps = needed <= FREE_SHARE * (free - self.left_free)
        why = f"{needed / 1e9:.2f} GB of {free / 1e9:.2f} GB free"
        if self.left_free:
            why += f", less {self.left_free / 1e9:.2f} GB for decoding"
        self.found.kept = ("chunk" if keeps else "pass", why)
        return keeps

    def report(self) -> dict[str, Any]:
        """The choices as plain data for logs and manifests: the number of layers per path, and each reason once."""
        layers: dict[str, set[int]] = {}
        refused: dict[str, list[str]] = {}
        for (layer, _), choice in self.found.choices.items():
            name = choice.path if choice.path != "expand" else f"expand, {choice.backend}"
            layers.setdefault(name, set()).add(layer)
            for path, reason in choice.refused.items():
                if reason not in refused.setdefault(path, []):
                    refused[path].append(reason)
        paths = {name: len(found) for name, found in layers.items()}
        return {
            "mode": self.settings.mode,
            "paths": paths,
            "refused": refused,
            "history": self.found.kept and list(self.found.kept),
        }

    def announce(self) -> None:
        """Log the choices and their reasons in one line, once."""
        if self.found.announced or not (self.found.choices or self.settings.mode == "torch"):
            return
        self.found.announced = True
        logger.info("%s", describe(self.report()))


def _distances(
    out: Tensor, expected: Tensor, written: Tensor | None, step: AttentionPass
) -> tuple[float, float, float]:
    """The largest output, the largest difference from torch's `expected`, and how far the rows `written` are apart.

    Of processes that share a chunk, the largest of any.
    """
    largest, difference = float(expected.abs().max()), float((out.float() - expected).abs().max())
    apart = 0.0 if written is None else _rows_apart(written, step)
    if step.share is not None:
        own = torch.tensor([largest, difference, apart], dtype=torch.float64, device=out.device)
        largest, difference, apart = step.share.agree(own).tolist()
    return largest, difference, apart


def _own_rows(step: AttentionPass) -> Tensor:
    """The chunk's rows in the cache, float32 `[B, S, row]`; a copy."""
    assert step.cache is not None and step.kept is not None and step.places is not None
    return step.cache.take(step.kept, step.places.own_slots).float()


def _rows_apart(written: Tensor, step: AttentionPass) -> float:
    """How far rows `[B, S, row]` are from those that torch has written since, relative to the largest number.

    Quantized numbers may be a step apart, because a kernel rounds what it quantizes less often than torch.
    """
    assert step.cache is not None and step.kept is not None and step.places is not None
    expected = _own_rows(step)
    apart = (written - expected).abs() - step.cache.steps(step.kept, step.places.own_slots)
    # Rows of zeros must be zeros; NaN is passed on.
    return float(apart.max().clamp(min=0) / expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny))


def _kind(layer: CausalSelfAttention, shape: Shape, choice: Choice) -> Hashable:
    """What the kernels of a choice are compiled for, apart from the number of tokens."""
    compiled = (layer.rank, layer.expansion, shape.dtype, shape.device, shape.cache)
    return (choice.path, choice.backend, type(layer), *compiled)


def _by_torch(choice: Choice, reason: str) -> Choice:
    """Torch instead of `choice`, for that `reason`."""
    return Choice("torch", {**choice.refused, choice.path: reason})


def describe(report: dict[str, Any]) -> str:
    """`Kernels.report` in one line."""
    if report["mode"] == "torch":
        return "kernels: torch attends, as requested"
    taken = ", ".join(f"{count} x {path}" for path, count in report["paths"].items())
    reasons = dict.fromkeys(reason for found in report["refused"].values() for reason in found)
    line = f"kernels: {report['mode']}: {taken}"
    if report["history"]:
        how, why = report["history"]
        line += f"; history expanded once per {how} ({why})"
    return line + (f"; not taken: {'; '.join(reasons)}" if reasons else "")


def choose(
    layer: CausalSelfAttention, shape: Shape, step: AttentionPass, mode: Mode, device_costs: costs.Costs
) -> Choice:
    """The cheapest path that the kernels support; torch when there is none."""
    reason = left_to_torch(shape) if mode == "auto" else None
    if reason is None and shape.changed:
        reason = f"{shape.changed} has an adapter, a hook or a wrapped forward; merge or remove it"
    if reason is not None:
        return Choice("torch", dict.fromkeys(fused.PATHS, reason))
    refused: dict[str, str] = {}
    found: dict[fused.Path, tuple[float, fused.Backend]] = {}
    for path in fused.PATHS:
        reason = fused.why_not(layer, shape.dtype, shape.device, step, path)
        if reason is not None:
            refused[path] = reason
            continue
        prices = {
            backend: costs.cost(layer, shape.queries, shape.keys, path, backend, device_costs)
            for backend in fused.backends(layer, path)
        }
        backend = min(prices, key=prices.__getitem__)
        found[path] = (prices[backend], backend)
    if not found:
        return Choice("torch", refused)
    best = min(found, key=lambda path: found[path][0])
    price, backend = found.pop(best)
    refused |= {path: f"{other / price:.2f}x the cost of {best}" for path, (other, _) in found.items()}
    return Choice(best, refused, backend)


def left_to_torch(shape: Shape) -> str | None:
    """Why `auto` leaves attention to torch, whatever the kernels support, in one line; None where it asks them."""
    device = torch.device(shape.device).type
    if device == "cpu":
        return CPU_DEFAULT
    return FLOAT32_DEFAULT if device == "cuda" and shape.dtype == torch.float32 else None


def free_memory(device: torch.device) -> int | None:
    """Free bytes of a CUDA device, including what torch has reserved but not allocated; None for other devices."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + unused)
