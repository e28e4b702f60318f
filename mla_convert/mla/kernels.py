"""Which way a layer takes while a model streams: fused kernels, absorbed or expanded, or plain torch.

The rule is explicit and counts operations; what a kernel refuses is kept as text, so that it can be
printed and recorded. The kernels are the package `mla_attention`, shipped beside this one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from . import fused
from .attention import AttentionPass, CausalSelfAttention, DenseSelfAttention

Mode = Literal["auto", "triton", "torch"]

CHECK = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference from torch, relative to the largest output, that the first use of a kernel may have."""


class Shape(NamedTuple):
    """What a choice depends on: `queries` of a chunk and `keys` of the whole window, in tokens."""

    batch: int
    queries: int
    keys: int
    dtype: torch.dtype
    device: str


class Choice(NamedTuple):
    """The way of one layer, and why the others were not taken."""

    path: fused.Path | Literal["torch"]
    refused: dict[str, str]


@dataclass
class Kernels:
    """How a model attends while it streams without gradients; `mode` is the recipe's key `kernels`.

    `auto` takes kernels where they support a layer, after the first output with and without history has
    agreed with torch's, and torch elsewhere; `triton` raises UserError instead and compares nothing; `torch`
    never asks. `choices` holds what was chosen, by layer and shape. `keep_history` expands the history once a
    chunk and layer instead of once a pass, for the memory of a dense cache.
    """

    mode: Mode = "auto"
    keep_history: bool = False
    choices: dict[tuple[int, Shape], Choice] = field(default_factory=dict)
    checked: set[tuple[int, Shape, bool]] = field(default_factory=set)

    def attention(self, layer: CausalSelfAttention, hidden_states: Tensor, step: AttentionPass) -> Tensor | None:
        """`layer.attention` by kernels, `[B, S, H * V]`; None where torch is to do it."""
        if self.mode == "torch" or step.cache is None or torch.is_grad_enabled():
            return None
        batch, queries = hidden_states.shape[:2]
        keys = step.cache.rows[layer.layer].shape[1:-1].numel()
        shape = Shape(batch, queries, keys, hidden_states.dtype, hidden_states.device.type)
        key = (layer.layer, shape)
        if key not in self.choices:
            self.choices[key] = choose(layer, shape, step)
        path = self.choices[key].path
        if path == "torch":
            if self.mode == "triton":
                reasons = "; ".join(self.choices[key].refused.values())
                raise UserError(
                    f"no kernel for the attention of layer {layer.layer} ({reasons}); "
                    "`kernels: auto` lets torch take it"
                )
            return None
        # Without history other kernels run than with it.
        check = (*key, bool(step.views[0].history_frames))
        if self.mode == "triton" or check in self.checked:
            return fused.attention(layer, hidden_states, step, path, self.keep_history)
        self.checked.add(check)
        return self._checked(key, path, layer, hidden_states, step)

    def _checked(
        self,
        key: tuple[int, Shape],
        path: fused.Path,
        layer: CausalSelfAttention,
        hidden_states: Tensor,
        step: AttentionPass,
    ) -> Tensor | None:
        """The output of a kernel compared with torch's; where it fails or differs, None, and torch from now on."""
        try:
            out = fused.attention(layer, hidden_states, step, path, self.keep_history)
        except Exception as error:
            reason = f"{path} failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        else:
            expected = layer.eager_attention(hidden_states, step).float()
            difference = float((out.float() - expected).abs().max() / expected.abs().max())
            if difference <= CHECK[key[1].dtype]:
                return out
            reason = f"{path} differs from torch by {difference:.1e} of the largest output"
        self.choices[key] = Choice("torch", {**self.choices[key].refused, path: reason})
        return None

    def report(self) -> dict[str, Any]:
        """What was chosen, for people and manifests: the number of layers a way, and every reason once."""
        paths: dict[str, int] = {}
        refused: dict[str, list[str]] = {}
        for choice in self.choices.values():
            paths[choice.path] = paths.get(choice.path, 0) + 1
            for path, reason in choice.refused.items():
                if reason not in refused.setdefault(path, []):
                    refused[path].append(reason)
        return {"mode": self.mode, "paths": paths, "refused": refused}


def choose(layer: CausalSelfAttention, shape: Shape, step: AttentionPass) -> Choice:
    """The way with the fewest operations among those that the kernels support; torch when there is none."""
    refused: dict[str, str] = {}
    costs: dict[fused.Path, float] = {}
    for path in fused.PATHS:
        reason = fused.why_not(layer, shape.dtype, shape.device, step, path)
        if reason is None:
            costs[path] = operations(layer, shape, path)
        else:
            refused[path] = reason
    if not costs:
        return Choice("torch", refused)
    best = min(costs, key=costs.__getitem__)
    refused |= {
        path: f"{cost / costs[best]:.2f}x the operations of {best}" for path, cost in costs.items() if path != best
    }
    return Choice(best, refused)


def operations(layer: Any, shape: Shape, path: fused.Path) -> float:
    """Multiply-adds of one layer's attention to a full window, for one item of the batch.

    Absorbed, a pair of query and key costs `2 r + R` a head instead of `D + V`, and the weights that
    restore keys and values are applied to the queries; expanded, they are applied to every key.
    """
    heads, queries, keys = layer.heads, shape.queries, shape.keys
    if isinstance(layer, DenseSelfAttention):
        return float(2 * heads * queries * keys * layer.head_dim)
    restored, shared = layer.key_channels + layer.mla.v_head_dim, 2 * len(layer.rope_pairs)
    if path == "absorbed":
        return float(heads * queries * (keys * (2 * layer.rank + shared) + layer.rank * restored))
    return float(heads * keys * (queries * (restored + shared) + layer.rank * restored))
