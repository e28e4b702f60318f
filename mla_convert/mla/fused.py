"""Computes one streaming self-attention layer with the kernels of `mla_attention`.

The result equals `CausalSelfAttention.eager_attention`. Where history and own chunk need different queries, two
attentions are merged by their log-sum-exps. Shape letters as in `core.py`; r is `kv_lora_rank`, R the channels of the
shared key, W the width of a row.
"""

from __future__ import annotations

import importlib
import subprocess
from typing import Any, Literal, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionPass, CausalSelfAttention
from .core import Query, of_pairs
from .latent import LatentSelfAttention
from .plain import is_plain_linear
from .rope import rotate

Path = Literal["absorbed", "expand"]
PATHS: tuple[Path, ...] = ("absorbed", "expand")

Backend = Literal["sdpa", "attend"]
"""The attention over a workspace: torch's fused one, or ours, which splits the keys and returns the log-sum-exp."""


def why_not(layer: CausalSelfAttention, dtype: torch.dtype, device: str, step: AttentionPass, path: Path) -> str | None:
    """Why kernels cannot compute a layer on `path`, in one line; None when they can."""
    assert step.cache is not None
    try:
        ops = importlib.import_module("mla_attention")
    except ImportError as error:
        return f"the package mla_attention cannot be imported: {error}"
    if reason := ops.why_not(device, dtype):
        return str(reason)
    if step.cache.why_no_kernels is not None:
        return step.cache.why_no_kernels
    if not step.cache.is_ring:
        return f"{type(step.cache).__name__} is not a ring of frames"
    kept = step.cache.rows[layer.layer].dtype
    if kept not in (dtype, torch.int8):
        return f"the cache is {kept}, but the model computes in {dtype}"
    if kept == torch.int8 and not layer.own_chunk_exact:
        return "kernels would read the own chunk quantized, from a cache in fewer bits"
    if any(view.zero_keys for view in step.views):
        return "the model attends to keys of zeros"
    if _writes(layer, step):
        reason = ops.why_not_latent_write(layer.rank, layer.row_width - layer.rank, layer.head_dim, dtype)
        if reason is not None:
            return cast(str, reason)
    wide = layer.expansion
    if path == "absorbed":
        reason = layer.why_not_absorbed() or ops.why_not_latent_attention(layer.rank, wide.shared, dtype)
    else:
        reason = ops.why_not_attend(wide.key, wide.value)
        if reason is None and layer.rank:
            reason = ops.why_not_expand_kv(layer.rank, wide.nope, wide.shared, wide.value, dtype)
    if reason is None and not _one_workspace(layer):
        # The own chunk's dense keys and values are a part of their own.
        reason = ops.why_not_attend(layer.head_dim, layer.head_dim)
    return cast("str | None", reason)


def lacking(error: Exception) -> str | None:
    """What this machine lacks to compile kernels, in one line; None if `error` is not due to that."""
    # Triton's own error where it finds no C compiler, and that of the compiler's process.
    if not isinstance(error, subprocess.CalledProcessError) and "C compiler" not in str(error):
        return None
    return cast("str | None", importlib.import_module("mla_attention").lacking())


def backends(layer: CausalSelfAttention, path: Path) -> tuple[Backend, ...]:
    """The backends for `path`; `sdpa` is one of them where one softmax over the workspace is enough."""
    return ("sdpa", "attend") if path == "expand" and _one_workspace(layer) else ("attend",)


def writes_unread(layer: CausalSelfAttention, step: AttentionPass) -> bool:
    """Whether a kernel writes rows in this pass that its output does not depend on."""
    return step.write and layer.own_chunk_exact and _writes(layer, step)


def attention(
    layer: CausalSelfAttention, hidden_states: Tensor, step: AttentionPass, path: Path, backend: Backend = "attend"
) -> Tensor:
    """Attention output before `to_out`, `[B, N, H * V]`, of a streaming pass over hidden states `[B, N, C]`.

    If the cache's `expanded` keeps histories, the passes of a chunk share the expanded history of each layer.
    """
    assert step.cache is not None and step.chunk is not None
    kind = _LatentPass if isinstance(layer, LatentSelfAttention) else _DensePass
    pass_ = kind(layer, hidden_states, step, backend)
    if pass_.read_own:
        # The kernels read the own chunk from the cache, so passes without `write` also write it.
        pass_.write()
        step.cache.overwritten(step.chunk.stop)
    if path == "absorbed":
        out = pass_.absorbed()
    else:
        out = pass_.by_one_query() if _one_workspace(layer) else pass_.by_two_queries()
    if step.write and not pass_.read_own:
        pass_.write()
    return step.to_tokens(out.flatten(2))


class _FusedPass:
    """The projections of one layer in one pass, and the attention over them."""

    layer: CausalSelfAttention

    def __init__(
        self, layer: CausalSelfAttention, hidden_states: Tensor, step: AttentionPass, backend: Backend
    ) -> None:
        assert step.cache is not None and step.kept is not None and step.places is not None and step.chunk is not None
        self.ops: Any = importlib.import_module("mla_attention")
        self.layer = layer
        self.step, self.cache, self.backend = step, step.cache, backend
        self.chunk, self.places = step.chunk, step.places
        self.kept = step.kept
        self.rows = self.cache.ring(self.kept.rows)
        self.scales = None if self.kept.scales is None else self.cache.ring(self.kept.scales)
        # How many latents have 8 bits, if the others have 4.
        self.eight = None if self.kept.bits is None else self.kept.bits.eight
        self.dtype = hidden_states.dtype
        self.hidden_states = hidden_states
        self.query, self.key = layer.project_query(hidden_states), layer.to_k(hidden_states)
        self.history_tokens, self.own_tokens = len(self.places.history_rotations), len(self.places.own_rotations)
        self.read_own = not layer.own_chunk_exact
        # Projections, norms and rotations are of the own tokens; attention is of these heads of all tokens.
        self.local = step.local
        self.own_rotations = self.local.views[0].own_rotations
        self.heads = step.heads(layer)
        self._value: Tensor | None = None

    def value(self, out: Tensor | None = None) -> Tensor:
        """Values of the own tokens, `[B, N, H * V]`; the first call may project into `out` `[B, N, H, V]`."""
        if self._value is None:
            to_v, x = self.layer.to_v, self.hidden_states
            self._value = cast(Tensor, to_v(x)) if out is None else _project_into(out, to_v, x)
        return self._value

    def by_one_query(self) -> Tensor:
        """Attention to history and own chunk, both in one workspace: `[B, N, H, V]`."""
        layer, history = self.layer, self.history_tokens
        if layer.expansion.one_query:
            query = self._normed(self.query, layer.norm_q, self.own_rotations)
        else:
            query = self._history_query()
        key, value = self._workspace(history + self.own_tokens)
        self._expand_history(key, value)
        if self.read_own:
            (query,) = self._to_heads(query)
            self._expand(key[:, history:], value[:, history:], self.places.own_slots, self.places.own_rotations)
        elif self.step.share is not None:
            own_key = self._normed(self.key, layer.norm_k, self.own_rotations)
            query, *own = self._to_heads(query, own_key, layer.split_heads(self.value()))
            for kept, new in zip((key, value), own, strict=True):
                kept[:, history:] = new
        else:
            turning = _cos_sin(self.own_rotations)
            self.ops.qk_norm_rope_(
                key[:, history:], self.key, layer.norm_k.weight.flatten(), layer.norm_k.eps, turning, layer.heads
            )
            self.value(value[:, history:])
        if self.backend == "sdpa":
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            return F.scaled_dot_product_attention(query, key, value, scale=layer.scale).transpose(1, 2)
        out: Tensor = self.ops.attend(query, key, value, None, layer.scale)[0]
        return out

    def by_two_queries(self) -> Tensor:
        """Attention to the expanded history, merged with attention to the dense own chunk: `[B, N, H, V]`."""
        (query,), parts = self._to_heads(self._history_query()), [self._own_part()]
        if self.history_tokens:
            key, value = self._workspace(self.history_tokens)
            self._expand_history(key, value)
            parts.append(self.ops.attend(query, key, value, None, self.layer.scale))
        return self._merged(parts)

    def absorbed(self) -> Tensor:
        """Attention to the cached rows without expanding them: `[B, N, H, V]`."""
        raise ValueError(self.layer.why_not_absorbed())

    def write(self) -> None:
        """Store the chunk's rows in its ring slots."""
        raise NotImplementedError

    def _history_query(self) -> Tensor:
        """Rotated queries of the own tokens for the keys that are read from the cache, `[B, N, H, D]`."""
        plain = self._normed(self.query, self.layer.norm_q, None)
        return self.layer.history_query(Query(None, plain), self.local).rotated(self.own_rotations)

    def _own_part(self) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of the chunk's attention to its own dense keys and values."""
        layer, rotations = self.layer, self.own_rotations
        query, key = (
            self._normed(x, norm, rotations) for x, norm in ((self.query, layer.norm_q), (self.key, layer.norm_k))
        )
        query, key, value = self._to_heads(query, key, layer.split_heads(self.value()))
        part: tuple[Tensor, Tensor] = self.ops.attend(query, key, value, None, layer.scale)
        return part

    def _to_heads(self, *given: Tensor) -> tuple[Tensor, ...]:
        """`AttentionPass.to_heads` of `[B, N, H, D]`, contiguous."""
        if self.step.share is None:
            return given
        found = self.step.to_heads(*(x.flatten(2) for x in given))
        return tuple(x.unflatten(-1, (self.step.count(self.layer), -1)).contiguous() for x in found)

    def _expand_history(self, key: Tensor, value: Tensor) -> None:
        """Write the history to the beginning of a workspace, unless an earlier pass of the chunk has done so."""
        history, layer = self.history_tokens, self.layer.layer
        if not self.cache.expanded.holds(layer, self.chunk):
            self._expand(key[:, :history], value[:, :history], self.places.history_slots, self.places.history_rotations)
            self.cache.expanded.filled([layer], self.chunk)

    def _expand(self, key: Tensor, value: Tensor, slots: Tensor, rotations: Tensor) -> None:
        """Write rotated keys `[B, K, H, D]` and values `[B, K, H, V]` of the frames in `slots`, if any."""
        if len(rotations):
            self._expand_rows(key, value, slots, rotations)

    def _expand_rows(self, key: Tensor, value: Tensor, slots: Tensor, rotations: Tensor) -> None:
        raise NotImplementedError

    def _workspace(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, tokens, H, ...]`: the beginning of buffers for a full window.

        All layers share the buffers unless histories are kept.
        """
        window_tokens = self.kept.rows.shape[1:-1].numel()
        shape = (len(self.hidden_states), window_tokens, self.step.count(self.layer))
        widths = {"key": self.layer.expansion.key, "value": self.layer.expansion.value}
        key, value = (
            self.cache.expanded.tensor(self.layer.layer, name, (*shape, wide), self.dtype, self.rows.device)
            for name, wide in widths.items()
        )
        return key[:, :tokens], value[:, :tokens]

    def _normed(self, x: Tensor, norm: Any, rotations: Tensor | None) -> Tensor:
        """Queries or keys `[B, N, H * D]` after QK-norm and rotation, `[B, N, H, D]`."""
        turning = None if rotations is None else _cos_sin(rotations)
        out: Tensor = self.ops.qk_norm_rope(x, norm.weight.flatten(), norm.eps, turning, self.layer.heads)
        return out

    def _merged(self, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        if len(parts) == 1:
            return parts[0][0]
        first, second = parts
        merged: Tensor = self.ops.merge_pair(*first, *second)[0]
        return merged


class _DensePass(_FusedPass):
    """A pass of a layer whose cache holds every head's keys and values."""

    def write(self) -> None:
        self.layer.keep(self.layer.norm_k(self.key), self.value(), self.step)

    def _expand_rows(self, key: Tensor, value: Tensor, slots: Tensor, rotations: Tensor) -> None:
        kept = self.layer.expand(self.cache.take(self.kept, slots))
        key.copy_(kept.keys(rotations))
        value.copy_(kept.value)


class _LatentPass(_FusedPass):
    """A pass of a layer whose cache holds latents."""

    layer: LatentSelfAttention

    def absorbed(self) -> Tensor:
        """Attention to the latent rows directly: `[B, N, H, V]` (DeepSeek-V2, arXiv 2405.04434, section 2.1.2)."""
        layer, places = self.layer, self.places
        parts = [] if self.read_own else [self._own_part()]
        slots, rotations = places.history_slots, places.history_rotations
        if self.read_own:
            slots, rotations = places.slots, places.rotations
        if len(rotations):
            nope, *ropes = self._to_heads(*(x for x in self._split_query() if x is not None))
            weights = layer.absorbed(self.heads)
            out, lse = self.ops.latent_attention(
                torch.einsum("bqhn,hnr->bqhr", nope, weights.w_uk),
                ropes[0] if ropes else None,
                self.rows,
                self.scales,
                slots,
                None,
                _cos_sin(of_pairs(rotations, layer.rope_index)) if layer.expansion.shared else None,
                layer.scale,
                eight=self.eight,
            )
            if parts:
                # The bias of the keys shifts all logits of a query by the same amount.
                lse = lse + layer.scale * torch.einsum("bqhn,hn->bhq", nope.float(), weights.b_uk.float())
            parts.append((torch.einsum("bqhr,hvr->bqhv", out, weights.w_uv) + weights.b_uv, lse))
        return self._merged(parts)

    def _split_query(self) -> tuple[Tensor, Tensor | None]:
        """Queries for the latent, `[B, N, H, N']`, and queries for the shared key, `[B, N, H, R]`."""
        layer, rotations = self.layer, self.own_rotations
        wide = layer.expansion
        if wide.nope and wide.shared and not layer.bakes:
            found: tuple[Tensor, Tensor] = self.ops.split_query(
                self.query,
                layer.norm_q.weight.flatten(),
                layer.norm_q.eps,
                _cos_sin(rotations),
                layer.q_pe_coef,
                layer.nope_index,
                layer.rope_index,
                layer.heads,
            )
            return found
        nope, rope = self._history_query().split([wide.nope, wide.shared], dim=-1)
        return nope, rope.contiguous() if wide.shared else None

    def write(self) -> None:
        layer = self.layer
        if not _writes(layer, self.step):
            # Parts are summed before they are rounded to the cache's dtype, and rows of a share have to be gathered.
            layer.keep(self._normed(self.key, layer.norm_k, None).flatten(2), self.value(), self.step)
            return
        shared = layer.k_pe_proj if layer.caches_shared_key else None
        self.ops.latent_write_(
            self.rows,
            self.scales,
            self.places.own_slots,
            self.key,
            self.value(),
            layer.norm_k.weight.flatten(),
            layer.norm_k.eps,
            None if layer.k_mean is None else layer.k_mean.flatten(),
            layer.kv_a_proj.weight,
            layer.kv_a_proj.bias,
            None if shared is None else shared.weight,
            None if shared is None else shared.bias,
            _cos_sin(self.step.grid_rotations) if layer.bakes else None,
            layer.heads,
            self.eight,
        )

    def _expand_rows(self, key: Tensor, value: Tensor, slots: Tensor, rotations: Tensor) -> None:
        layer, wide = self.layer, self.layer.expansion
        # Keys for the dense queries are rotated in full, like dense keys.
        every_head, derived = wide.one_query, wide.shared > 0 and not layer.caches_shared_key
        turning = rotations if every_head else of_pairs(rotations, layer.rope_index) if wide.shared else None
        width = wide.nope + wide.shared
        self.ops.expand_kv_(
            key[..., :width],
            value,
            self.rows,
            self.scales,
            slots,
            None,
            *layer.restoring(self.heads),
            layer.k_pe_proj.weight if derived else None,
            layer.k_pe_proj.bias if derived else None,
            None if turning is None else _cos_sin(turning),
            every_head,
            self.eight,
        )
        if layer.k_mean is not None:
            mean = layer.k_mean if self.heads is None else layer.k_mean[self.heads]
            key[..., width:] = rotate(mean[None, None], rotations)


def _project_into(out: Tensor, linear: nn.Module, x: Tensor) -> Tensor:
    """Write `linear(x)` to `out` `[B, N, H, V]` and return it as `[B, N, H * V]`; a plain layer needs no copy."""
    flat = out.flatten(2)
    plain = is_plain_linear(linear) and linear.bias is not None
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if not plain or linear.weight.dtype != x.dtype or autocast:
        return flat.copy_(linear(x))
    assert isinstance(linear, nn.Linear)
    for item, target in zip(x, flat, strict=True):
        torch.addmm(linear.bias, item, linear.weight.T, out=target)
    return flat


def _cos_sin(rotations: Tensor) -> Tensor:
    """Complex64 rotations `[S, P]` as float32 `[S, P, 2]`."""
    return torch.view_as_real(rotations.contiguous())


def _writes(layer: CausalSelfAttention, step: AttentionPass) -> TypeGuard[LatentSelfAttention]:
    """Whether a kernel writes the layer's rows; torch writes dense ones, those that layers share and gathered ones."""
    return isinstance(layer, LatentSelfAttention) and layer.mla.layers_per_latent == 1 and step.share is None


def _one_workspace(layer: CausalSelfAttention) -> bool:
    """Whether the same queries address the expanded history and the own chunk, so one workspace can hold both."""
    return layer.expansion.one_query or not layer.own_chunk_exact
