"""Implements causal self-attention over chunks: the dense layer, and the pass that dense and latent layers share.

A layer projects its hidden states once and then attends chunk by chunk. So the forward over a whole clip does no
masked work and runs the same code as the streaming forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import FrameCache, StoredRows
from .core import Expansion, KeyValue, Query, Segment, attend
from .places import Places
from .rope import RotaryTable
from .window import CausalConfig, Chunk

if TYPE_CHECKING:
    from .kernels import Kernels
    from .parallel import Share


class ChunkView(NamedTuple):
    """One chunk of queries: its tokens, the history it sees and the rotations of both.

    In a pass over a clip, `history` slices the clip's tokens. In a streaming pass it is empty, and history is read from
    the cache. Rotations are complex64 `[tokens, P]`. The chunk also attends to `zero_keys` keys and values of zeros,
    for models that pad this way.
    """

    own: slice
    history: tuple[slice, ...]
    own_rotations: Tensor
    history_rotations: Tensor
    zero_keys: int = 0

    @property
    def has_history(self) -> bool:
        """Whether the chunk sees any earlier token."""
        return len(self.history_rotations) > 0


class Part:
    """Where a layer that shares its latent leaves its summand of it, `[B', S, r]` in `rows`.

    It is no dataclass, because FSDP2 calls a block with a copy of every dataclass that holds tensors with a gradient.
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None


@dataclass
class AttentionPass:
    """The state that all self-attention layers of one forward share; `of` adds the state of one layer.

    `grid_rotations` `[S, P]` rotate all tokens by their place in the frame, with time left at 0, for layouts that bake
    the place in. With `context_batch`, the first items of the batch are the clean context that all items read their
    history from (teacher forcing, packed in the batch axis). When a sequence holds tokens that are never cached,
    `cached` slices the tokens that may be. In a streaming pass, made by `chunk_pass`, `chunk` attends to `cache`, which
    is read and written at `places`; `kernels` may compute a layer's attention. With a `share`, several processes divide
    the chunk: the pass still describes the whole chunk, while hidden states are those of the process's own tokens.

    For one layer, `kept` are its tensors in the cache, and `choice` is what `kernels` chose for it. If `write` is set,
    a layer that shares its latent leaves its summand in `part`. In a pass over a clip, such layers read history from
    `latents` `[B', K, r]`, the complete latents of the clip's tokens. Blocks only read the fields: what they assigned
    to one could be lost (see `Part`).
    """

    views: list[ChunkView]
    grid_rotations: Tensor
    cache: FrameCache | None = None
    write: bool = False
    places: Places | None = None
    chunk: Chunk | None = None
    context_batch: int | None = None
    cached: slice | None = None
    kernels: Kernels | None = None
    latents: Tensor | None = None
    share: Share | None = None
    kept: StoredRows | None = None
    choice: Any = None
    part: Part | None = None

    def of(self, layer: CausalSelfAttention, tokens: Tensor) -> AttentionPass:
        """This pass for one layer of a model, given the model's `tokens` `[B, S, C]`.

        Everything that depends on the layer's number is looked up here, outside the blocks: torch.compile would
        recompile a block for every integer attribute that it reads.
        """
        if self.cache is None:
            return replace(self, part=Part())
        choice = None if self.kernels is None else self.kernels.takes(layer, tokens, self)
        kept, kernels = self.cache.kept(layer.row_layer), None if choice is None else self.kernels
        return replace(self, kept=kept, kernels=kernels, choice=choice, part=Part())

    @property
    def local(self) -> AttentionPass:
        """The pass as this process's own tokens see it, for what concerns each token alone; without a share, itself."""
        if self.share is None:
            return self
        own = self.share.tokens
        views = [view._replace(own_rotations=view.own_rotations[own]) for view in self.views]
        return replace(self, views=views, grid_rotations=self.grid_rotations[own], share=None)

    def heads(self, layer: CausalSelfAttention) -> slice | None:
        """The heads of a layer that this process attends with; None for all of them."""
        return None if self.share is None else self.share.heads(layer.heads)

    def count(self, layer: CausalSelfAttention) -> int:
        """The number of these heads."""
        return layer.heads if self.share is None else layer.heads // self.share.processes

    def to_heads(self, *given: Tensor) -> tuple[Tensor, ...]:
        """All heads of the own tokens, `[B, S', H * D]` each, exchanged for these heads of all tokens."""
        return given if self.share is None else self.share.to_heads(*given)

    def to_tokens(self, x: Tensor) -> Tensor:
        """The reverse of `to_heads`."""
        return x if self.share is None else self.share.to_tokens(x)

    def gathered(self, x: Tensor) -> Tensor:
        """All tokens, from the own tokens `[B, S', C]` of every process."""
        return x if self.share is None else self.share.gather(x)

    def keep(self, rows: Tensor) -> None:
        """Write a layer's rows `[B, S, row]` to the cache; only for a streaming pass with `write`."""
        assert self.cache is not None and self.kept is not None and self.places is not None
        self.cache.put(self.kept, self.places.own_slots, rows)

    def history(self, view: ChunkView) -> Tensor:
        """A layer's rows `[B, K, row]` of a chunk's history, from shared `latents` or from the cache."""
        if self.latents is not None:
            return torch.cat([self.latents[:, tokens] for tokens in view.history], dim=1)
        assert self.cache is not None and self.kept is not None and self.places is not None
        return self.cache.take(self.kept, self.places.history_slots)


def token_slices(frames: list[int], tokens: int) -> tuple[slice, ...]:
    """Token slices of ascending `frames`, one per contiguous run."""
    runs: list[list[int]] = []
    for frame in frames:
        if runs and runs[-1][1] == frame:
            runs[-1][1] = frame + 1
        else:
            runs.append([frame, frame + 1])
    return tuple(slice(a * tokens, b * tokens) for a, b in runs)


def clip_pass(
    table: RotaryTable,
    causal: CausalConfig,
    num_frames: int,
    height: int,
    width: int,
    context_batch: int | None = None,
) -> AttentionPass:
    """Block-causal pass over a clip of `num_frames` frames of `height x width` tokens."""
    tokens, views = height * width, []
    for start, stop in causal.chunks(num_frames):
        own, history = list(range(start, stop)), causal.history(start, stop)
        views.append(
            ChunkView(
                slice(start * tokens, stop * tokens),
                token_slices(history, tokens),
                table.rotations(causal.temporal_index(own, stop), height, width),
                table.rotations(causal.temporal_index(history, stop), height, width),
            )
        )
    grid = table.rotations([0] * num_frames, height, width)
    return AttentionPass(views, grid, context_batch=context_batch)


# A compiled graph would be valid for the frames of one chunk only. `torch.compiler.disable` would import the compiler
# with this module, which takes as long as torch itself.
@torch._disable_dynamo
def stream_pass(
    rotary_table: Callable[[], RotaryTable], cache: FrameCache, num_frames: int, write: bool
) -> AttentionPass:
    """Pass over the next `num_frames` frames of a rollout, with history from `cache`; see `PlacesMemo.next`."""
    chunk = Chunk(cache.frames_seen, cache.frames_seen + num_frames)
    return chunk_pass(cache, chunk, cache.places.next(rotary_table, cache, num_frames), write)


def chunk_pass(cache: FrameCache, chunk: Chunk, places: Places, write: bool, zero_keys: int = 0) -> AttentionPass:
    """Pass over one chunk of a rollout, with history from `cache`; `places` locates both."""
    own = slice(0, len(places.own_rotations))
    view = ChunkView(own, (), places.own_rotations, places.history_rotations, zero_keys)
    return AttentionPass([view], places.grid, cache=cache, write=write, places=places, chunk=chunk)


def padded(x: Tensor, zeros: int) -> Tensor:
    """`x` `[B, K, H, D]` with `zeros` tokens of zeros appended."""
    return F.pad(x, (0, 0, 0, 0, 0, zeros)) if zeros else x


class CausalSelfAttention(nn.Module):
    """Base of the self-attention layers that replace a family's `attn1`.

    Subclasses hold `to_out` and define how tokens become queries, keys and values (`project`), what is cached
    (`encode`, `row_width`) and how it is read back (`expand`, `history_query`). With `own_chunk_exact`, a chunk attends
    to itself with its dense keys and values, otherwise with what would be restored from the cache. `rank` is the width
    of the latent, 0 where keys and values are cached themselves.
    """

    rank: int = 0
    layer: int
    heads: int
    head_dim: int
    scale: float
    own_chunk_exact: bool
    to_q: nn.Linear
    to_k: nn.Linear
    to_v: nn.Linear
    to_out: nn.ModuleList
    norm_q: nn.RMSNorm
    norm_k: nn.RMSNorm

    @property
    def row_width(self) -> int:
        """Cached scalars per token."""
        raise NotImplementedError

    def project_raw(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys before QK-norm, and values, from `[B, S, C]`: three tensors `[B, S, H * D]`."""
        return self.project_query(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)

    def project_query(self, hidden_states: Tensor) -> Tensor:
        """Queries before QK-norm, `[B, S, H * D]`."""
        return cast(Tensor, self.to_q(hidden_states))

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalized, unrotated queries and keys, and values, from `[B, S, C]`: three tensors `[B, S, H * D]`."""
        raise NotImplementedError

    def encode(self, key: Tensor, value: Tensor, step: AttentionPass) -> Tensor:
        """Cache rows `[B, S, row]` of these keys and values."""
        raise NotImplementedError

    def expand(self, rows: Tensor, heads: slice | None = None) -> KeyValue:
        """Keys and values per head, or of some `heads`, from cache rows `[B, K, row]`."""
        raise NotImplementedError

    @property
    def expansion(self) -> Expansion:
        """Sizes of the keys and values that `expand` returns."""
        raise NotImplementedError

    def why_not_absorbed(self) -> str | None:
        """Why queries cannot attend to the cached rows directly, in one line; None when they can."""
        raise NotImplementedError

    def rows(self, key: Tensor, value: Tensor, step: AttentionPass) -> Tensor:
        """What `encode` returns for all of a chunk's tokens, given the keys and values of this process's own."""
        return step.gathered(self.encode(key, value, step.local))

    def restore(self, key: Tensor, value: Tensor, step: AttentionPass) -> KeyValue:
        """These keys and values as later chunks will see them."""
        return self.expand(self.rows(key, value, step), step.heads(self))

    def keep(self, key: Tensor, value: Tensor, step: AttentionPass) -> None:
        """Write these keys and values to the cache; only for a streaming pass with `write`."""
        step.keep(self.rows(key, value, step))

    @property
    def row_layer(self) -> int:
        """The layer whose cache rows this layer reads."""
        return self.layer

    def history_query(self, query: Query, step: AttentionPass) -> Query:
        """Dense queries in the form that the keys of `expand` need; the same object when nothing changes."""
        return query

    def split_heads(self, x: Tensor) -> Tensor:
        """`[B, S, H * D]` as `[B, S, H, D]`, also of fewer heads than the layer's."""
        return x.unflatten(-1, (-1, self.head_dim))

    def attention(self, hidden_states: Tensor, step: AttentionPass) -> Tensor:
        """Attention output before `to_out`, `[B, S, H * V]`, computed by kernels where the pass has them."""
        out = None if step.kernels is None else step.kernels.attention(self, hidden_states, step)
        return self.eager_attention(hidden_states, step) if out is None else out

    def eager_attention(self, hidden_states: Tensor, step: AttentionPass) -> Tensor:
        """The definition of `attention`, in plain torch."""
        query, key, value = self.project(hidden_states)
        rows = None
        if self.own_chunk_exact:
            query, *dense = step.to_heads(query, key, value)
            own = KeyValue(None, *(self.split_heads(x) for x in dense))
        else:
            (query,) = step.to_heads(query)
            rows = self.rows(key, value, step)
            own = self.expand(rows, step.heads(self))
        dense_query = Query(None, self.split_heads(query))
        history_query = self.history_query(dense_query, step)
        own_query = dense_query if self.own_chunk_exact else history_query
        past = None
        if step.cache is None and step.latents is None and len(step.views) > 1:
            # Later chunks of a clip see what would be restored from the cache.
            items = step.context_batch
            past = self.restore(key[:items], value[:items], step) if self.own_chunk_exact else own
        outputs = []
        for view in step.views:
            to_own = own_query.tokens(view.own).rotated(view.own_rotations)
            own_chunk = own.tokens((view.own,))
            own_keys = own_chunk.keys(view.own_rotations)
            segments = [Segment(to_own, padded(own_keys, view.zero_keys), padded(own_chunk.value, view.zero_keys))]
            if view.has_history:
                to_history = to_own
                if history_query is not own_query:
                    to_history = history_query.tokens(view.own).rotated(view.own_rotations)
                segments.insert(0, Segment(to_history, *self._history(view, past, to_own, step)))
            outputs.append(attend(segments, self.scale))
        if step.write and rows is not None:
            step.keep(rows)
        elif step.write:
            self.keep(key, value, step)
        return step.to_tokens(torch.cat(outputs, dim=1).flatten(2))

    def _history(
        self, view: ChunkView, past: KeyValue | None, query: Tensor, step: AttentionPass
    ) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of the frames in a chunk's history.

        They are those of `past`, or are read from the cache or from shared latents. `query` has their dtype and batch.
        """
        if past is not None:
            history = past.tokens(view.history, step.context_batch)
        else:
            history = self.expand(step.history(view).to(query.dtype), step.heads(self))
        key, value = history.keys(view.history_rotations), history.value
        if step.context_batch is None:
            return key, value
        copies = query.shape[0] // step.context_batch
        return key.repeat(copies, 1, 1, 1), value.repeat(copies, 1, 1, 1)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        rotary_emb: AttentionPass,
    ) -> Tensor:
        """Attention output `[B, S, C]`; the arguments are those of diffusers' `WanAttention`."""
        out: Tensor = self.attention(hidden_states, rotary_emb).to(hidden_states.dtype)
        for module in self.to_out:
            out = module(out)
        return out


class DenseSelfAttention(CausalSelfAttention):
    """Self-attention with a key and a value per head; its parameters are those of diffusers' `WanAttention`.

    QK-norm is one RMSNorm over all heads. A cache row is `[k | v]` with normalized, unrotated keys, so re-indexing a
    window never changes it. Of processes that share chunks, each caches its own heads only.
    """

    own_chunk_exact = True

    def __init__(self, dim: int, heads: int, head_dim: int, eps: float, layer: int) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads, self.head_dim, self.layer = heads, head_dim, layer
        self.scale = head_dim**-0.5
        self.to_q = nn.Linear(dim, inner)
        self.to_k = nn.Linear(dim, inner)
        self.to_v = nn.Linear(dim, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim), nn.Dropout(0.0)])
        self.norm_q = nn.RMSNorm(inner, eps=eps)
        self.norm_k = nn.RMSNorm(inner, eps=eps)

    @property
    def row_width(self) -> int:
        return 2 * self.heads * self.head_dim

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.project_raw(hidden_states)
        return self.norm_q(query), self.norm_k(key), value

    def encode(self, key: Tensor, value: Tensor, step: AttentionPass) -> Tensor:
        return torch.cat([key, value], dim=-1)

    def rows(self, key: Tensor, value: Tensor, step: AttentionPass) -> Tensor:
        key, value = step.to_heads(key, value)
        return self.encode(key, value, step)

    def expand(self, rows: Tensor, heads: slice | None = None) -> KeyValue:
        key, value = rows.chunk(2, dim=-1)
        return KeyValue(None, self.split_heads(key), self.split_heads(value))

    @property
    def expansion(self) -> Expansion:
        return Expansion(self.head_dim, 0, 0, self.head_dim, one_query=True)

    def why_not_absorbed(self) -> str | None:
        return "a dense cache holds no latents"

    def restore(self, key: Tensor, value: Tensor, step: AttentionPass) -> KeyValue:
        return KeyValue(None, self.split_heads(key), self.split_heads(value))
