"""A streaming step of the Wan2.1-1.3B geometry with random weights, and the variants of its self-attention ("ways").

It uses only plain torch and `mla_attention`. A way owns its cache, filled with random history, and implements
`attend(layer, query, key, value)` on `[B, N, H * D]` before QK-norm. It normalizes, rotates, stores the chunk in its
cache and attends to the whole window, like each denoising pass of a chunk. `ops` names the `mla_attention` ops that a
pass runs, `writes` the ops that only a writing pass runs, and `attends` the attention that is used.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import mla_attention as ops
import torch
import torch.nn.functional as F
from dense import TORCH, torch_attention, torch_runs, with_lse

EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """Wan2.1-1.3B at 480x832: a window of 21 frames, chunks of 3, 1,560 tokens per frame."""

    layers: int = 30
    heads: int = 12
    head_dim: int = 128
    ffn: int = 8960
    tokens: int = 1560
    window: int = 21
    chunk: int = 3
    text: int = 512
    batch: int = 1

    @property
    def dim(self):
        return self.heads * self.head_dim

    @property
    def queries(self):
        return self.chunk * self.tokens

    @property
    def keys(self):
        return self.window * self.tokens

    @property
    def grid(self):
        """Rows and columns of tokens in a frame."""
        width = next(w for w in range(int(self.tokens**0.5), 0, -1) if self.tokens % w == 0)
        return self.tokens // width, width


def rotations(shape, frames, device):
    """cos and sin for every token of some frames, float32 `[len(frames) * T, D / 2, 2]`, along Wan's three axes."""
    pairs = shape.head_dim // 2
    spatial = shape.head_dim // 6
    height, width = shape.grid
    angle = 10000.0 ** -(torch.arange(pairs, device=device) / pairs)
    grid = torch.cartesian_prod(
        torch.tensor(frames, device=device),
        torch.arange(height, device=device),
        torch.arange(width, device=device),
    ).float()
    axis = torch.tensor([0] * (pairs - 2 * spatial) + [1] * spatial + [2] * spatial, device=device)
    turned = grid[:, axis] * angle
    return torch.stack([turned.cos(), turned.sin()], dim=-1)


class Published:
    """Self-Forcing's attention as its published code executes it (arXiv 2506.08009, `wan/modules/causal_model.py`).

    It repeats the launches of that code one by one: six for a norm, a rotation in float64 with the copies made by `cat`
    and `stack`, and a cache of rotated keys whose end positions are on the device and are read by the host in every
    layer. On the first pass of a chunk, the part of the full window that stays is cloned and moved. `run` attends to
    `[B, N, H, D]` in place of its FlashAttention; the sequence lengths that the code builds for it are omitted.
    """

    def __init__(self, shape, device, dtype, run=None):
        self.shape, self.run = shape, run or torch_attention
        size = (shape.batch, shape.keys, shape.heads, shape.head_dim)
        self.keys = [torch.randn(size, device=device, dtype=dtype) for _ in range(shape.layers)]
        self.values = [torch.randn(size, device=device, dtype=dtype) for _ in range(shape.layers)]
        self.gain = torch.ones(shape.dim, device=device, dtype=dtype)
        pairs = shape.head_dim // 2
        widths = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
        self.freqs = torch.cat([_frequencies(shape.window, width, device) for width in widths], dim=1)
        # The cache is full and includes the chunk until the next one starts.
        self.end = shape.keys
        self.ends = [
            [torch.full((1,), shape.keys, dtype=torch.long, device=device) for _ in range(2)]
            for _ in range(shape.layers)
        ]
        self.ops, self.writes, self.attends = set(), set(), _label(self, run)

    def start_chunk(self):
        """Advance the window by one chunk."""
        self.end += self.shape.queries

    def attend(self, layer, query, key, value):
        heads, new, kept = self.shape.heads, key.shape[1], self.shape.keys
        query, key = (self._normed(x).unflatten(-1, (heads, -1)) for x in (query, key))
        value = value.unflatten(-1, (heads, -1))
        start = self.shape.window - self.shape.chunk
        query, key = (self._rotated(x, start).type_as(value) for x in (query, key))
        keys, values, (everything, local) = self.keys[layer], self.values[layer], self.ends[layer]
        gone = 0
        if self.end > everything.item() and new + local.item() > kept:
            gone = new + local.item() - kept
            rolled = local.item() - gone
            for cache in (keys, values):
                cache[:, :rolled] = cache[:, gone : gone + rolled].clone()
        end = local.item() + self.end - everything.item() - gone
        keys[:, end - new : end] = key
        values[:, end - new : end] = value
        out = self.run(query, keys[:, max(0, end - kept) : end], values[:, max(0, end - kept) : end])
        everything.fill_(self.end)
        local.fill_(end)
        return out

    def _normed(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + EPS)).type_as(x) * self.gain

    def _rotated(self, x, start):
        frames, (height, width), heads, pairs = self.shape.chunk, self.shape.grid, x.shape[2], x.shape[3] // 2
        freqs = self.freqs.split([pairs - 2 * (pairs // 3), pairs // 3, pairs // 3], dim=1)
        output, count = [], frames * height * width
        for item in x:
            turned = torch.view_as_complex(item[:count].to(torch.float64).reshape(count, heads, -1, 2))
            each = torch.cat(
                [
                    freqs[0][start : start + frames].view(frames, 1, 1, -1).expand(frames, height, width, -1),
                    freqs[1][:height].view(1, height, 1, -1).expand(frames, height, width, -1),
                    freqs[2][:width].view(1, 1, width, -1).expand(frames, height, width, -1),
                ],
                dim=-1,
            ).reshape(count, 1, -1)
            output.append(torch.cat([torch.view_as_real(turned * each).flatten(2), item[count:]]))
        return torch.stack(output).type_as(x)

    def bytes(self):
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))


def _frequencies(window, pairs, device):
    """Self-Forcing's rotations along one axis, complex128 `[positions, pairs]`, for at least the window."""
    angle = 10000.0 ** -(torch.arange(pairs, device=device, dtype=torch.float64) / pairs)
    positions = torch.arange(max(1024, window), device=device, dtype=torch.float64)
    turned = torch.outer(positions, angle)
    return torch.polar(torch.ones_like(turned), turned)


class Dense:
    """A tuned dense cache: a ring in which nothing moves, with fused norm and rotation.

    With `reindexed` False it caches rotated keys (absolute positions). With True it caches keys as projected; every
    pass copies the window to a workspace, normalized and rotated in one launch that reads and writes it once. Unlimited
    rollouts within the rotary table need this. `run` attends to `[B, N, H, D]`: the fastest stock attention with its
    best number of splits. `kernels` provides the norm and the rotation: `mla_attention` or `plain`.
    """

    def __init__(self, shape, device, dtype, reindexed, run=None, kernels=ops):
        self.shape, self.reindexed, self.run = shape, reindexed, run or torch_attention
        self.kernels = kernels
        size = (shape.batch, shape.keys, shape.heads, shape.head_dim)
        self.keys = [torch.randn(size, device=device, dtype=dtype) for _ in range(shape.layers)]
        self.values = [torch.randn(size, device=device, dtype=dtype) for _ in range(shape.layers)]
        self.gain = torch.ones(shape.dim, device=device, dtype=dtype)
        self.window = rotations(shape, range(shape.window), device)
        self.own = self.window[-shape.queries :].contiguous()
        self.workspace = torch.empty(size, device=device, dtype=dtype) if reindexed else None
        self.ops = {"qk_norm_rope"} if kernels is ops else set()
        self.writes, self.attends = set(), _label(self, run)

    def start_chunk(self):
        """Do nothing: this way keeps no state between passes."""

    def attend(self, layer, query, key, value):
        heads, new = self.shape.heads, key.shape[1]
        query = self.kernels.qk_norm_rope(query, self.gain, EPS, self.own, heads)
        keys, values = self.keys[layer], self.values[layer]
        values[:, -new:] = value.unflatten(-1, (heads, -1))
        if self.workspace is None:
            self.kernels.qk_norm_rope_(keys[:, -new:], key, self.gain, EPS, self.own, heads)
        else:
            keys[:, -new:] = key.unflatten(-1, (heads, -1))
            self.kernels.qk_norm_rope_(self.workspace, keys.flatten(2), self.gain, EPS, self.window, heads)
            keys = self.workspace
        return self.run(query, keys, values)

    def bytes(self):
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))


class Latent:
    """History as latents, with the chunk itself exact. `path` is `absorbed` or `expand`.

    `shared` 0 means the layout rotate_on_read, which can only be expanded; otherwise it is the width of the shared key,
    and every head has `head_dim - shared` unrotated channels. `run` attends to `[B, N, H, D]`; None means our `attend`.
    If history and chunk need separate attention, `apart` names the stock attention that provides it with a log-sum-exp,
    except for absorbed histories; None means `attend`. With `keep`, every layer keeps its expanded history for the
    passes of a chunk. With `ahead`, the history of the next layer is expanded to a second workspace, on a separate
    stream, during the current layer. Of each group of `together` layers, the first owns the rows; all of them write a
    part, and each expands the rows for itself. A pass with `writing` set also caches the chunk, like the last pass of a
    chunk, from the keys and values it has already projected.
    """

    def __init__(
        self, shape, device, dtype, rank, shared, path, run=None, keep=False, together=1, ahead=False, apart=None
    ):
        self.shape, self.rank, self.shared, self.path = shape, rank, shared, path
        self.run, self.keep, self.together, self.kernels, self.apart = run, keep, together, ops, apart
        self.parts, self.writing = None, False
        self.expanded = set()
        dim, heads, depth = shape.dim, shape.heads, shape.head_dim
        size = (shape.batch, shape.window, shape.tokens, rank + shared)
        self.rows = [torch.randn(size, device=device, dtype=dtype) for _ in range(0, shape.layers, together)]
        self.gain = torch.ones(dim, device=device, dtype=dtype)
        self.nope = depth - shared

        def weight(*sizes):
            return torch.randn(*sizes, device=device, dtype=dtype) * sizes[-1] ** -0.5

        self.down, self.down_bias = weight(rank, 2 * dim), torch.zeros(rank, device=device, dtype=dtype)
        self.up = weight(heads * (self.nope + depth), rank)
        self.up_bias = torch.zeros(len(self.up), device=device, dtype=dtype)
        self.pe = weight(shared, dim) if shared else None
        self.pe_bias = torch.zeros(shared, device=device, dtype=dtype) if shared else None
        history = shape.window - shape.chunk
        every = rotations(shape, range(shape.window), device)
        self.own = every[-shape.queries :].contiguous()
        pairs = shared // 2 if shared else depth // 2
        self.turn = every[: history * shape.tokens, :pairs].contiguous()
        self.slots = torch.arange(history, dtype=torch.int32, device=device)
        self.own_slots = torch.arange(history, shape.window, dtype=torch.int32, device=device)
        if path == "expand":
            tail = 0 if shared else shape.queries
            keys = (shape.batch, history * shape.tokens + tail, heads, depth)
            owners = shape.layers if keep else 1 + ahead
            self.spaces = [[torch.empty(keys, device=device, dtype=dtype) for _ in range(2)] for _ in range(owners)]
        self.ahead, self.coming = ahead, None
        self.side = torch.cuda.Stream(device) if ahead and device.type == "cuda" else None
        self.ops = {"qk_norm_rope", "latent_attention" if path == "absorbed" else "expand_kv_"}
        self.writes = set() if together > 1 else {"latent_write_"}
        if apart is None and (shared or run is None):
            self.ops.add("attend")
        if shared:
            self.ops.add("merge_pair")
        if path == "absorbed":
            self.ops.add("split_query")
            each = torch.arange(depth // 2, device=device)
            self.pairs = each[pairs:], each[:pairs]
            self.coefficients = weight(heads, pairs, 2).contiguous()
        self.attends = "attend" if run is None else _label(self, run)
        if shared:
            # Different queries attend to history and to the chunk.
            other = apart or "attend"
            self.attends = f"{'latent_attention' if path == 'absorbed' else other} and {other}, merged"

    def start_chunk(self):
        """Invalidate expanded histories: the rows have changed."""
        self.expanded, self.coming = set(), None

    def attend(self, layer, query, key, value):
        """Run one pass of a layer on queries, keys and values `[B, N, H * D]`."""
        if self.writing:
            self.write(layer, key, value)
        shape, rows = self.shape, self.rows[layer // self.together]
        scale, heads = shape.head_dim**-0.5, shape.heads
        own_query = self.kernels.qk_norm_rope(query, self.gain, EPS, self.own, heads)
        own_value = value.unflatten(-1, (heads, -1))
        history = len(self.turn)
        if self.path == "expand":
            keys, values = self.spaces[self._space(layer)]
            self._restore(layer)
            if not self.shared:
                self.kernels.qk_norm_rope_(keys[:, history:], key, self.gain, EPS, self.own, heads)
                values[:, history:] = own_value
                if self.run is not None:
                    return self.run(own_query, keys, values)
                return self.kernels.attend(own_query, keys, values, None, scale, 0)[0]
            out = self._attended(own_query, keys, values)
        else:
            up_key, up_value = self.up.unflatten(0, (heads, -1)).split([self.nope, shape.head_dim], dim=1)
            nope, pe = self.kernels.split_query(query, self.gain, EPS, self.own, self.coefficients, *self.pairs, heads)
            absorbed = torch.einsum("bqhn,hnr->bqhr", nope, up_key)
            mixed, lse = self.kernels.latent_attention(absorbed, pe, rows, None, self.slots, None, self.turn, scale)
            out = torch.einsum("bqhr,hvr->bqhv", mixed, up_value), lse
        own_key = self.kernels.qk_norm_rope(key, self.gain, EPS, self.own, heads)
        own = self._attended(own_query, own_key, own_value)
        return self.kernels.merge_pair(*out, *own)[0]

    def _attended(self, query, key, value):
        """Attention to one of the two parts, with its log-sum-exp."""
        scale = self.shape.head_dim**-0.5
        if self.apart is None or self.kernels is not ops:
            return self.kernels.attend(query, key, value, None, scale, 0)
        return with_lse(self.apart, query, key, value, scale)

    def _space(self, layer):
        return layer if self.keep else layer % len(self.spaces)

    def _restore(self, layer):
        """Make the history of a layer available in its workspace for all later launches."""
        if self.coming == layer:
            self._wait(self.side)
        elif layer not in self.expanded:
            # The other stream may still be writing to this workspace.
            self._wait(self.side)
            self._expand(layer)
            if self.keep:
                self.expanded.add(layer)
        if self.ahead:
            self.coming = layer + 1 if layer + 1 < self.shape.layers else None
            if self.coming is not None:
                with self._beside():
                    self._expand(self.coming)

    def _wait(self, stream):
        if stream is not None:
            torch.cuda.current_stream(stream.device).wait_stream(stream)

    @contextlib.contextmanager
    def _beside(self):
        """The other stream, made to wait for all launches so far, including attention that reads its workspace."""
        if self.side is None:
            yield
            return
        self.side.wait_stream(torch.cuda.current_stream(self.side.device))
        with torch.cuda.stream(self.side):
            yield

    def _expand(self, layer):
        history, rows = len(self.turn), self.rows[layer // self.together]
        keys, values = (x[:, :history] for x in self.spaces[self._space(layer)])
        self.kernels.expand_kv_(
            keys, values, rows, None, self.slots, None,
            self.up, self.up_bias, None, None, self.turn, not self.shared,
        )  # fmt: skip

    def write(self, layer, key, value):
        """Cache the chunk, like the last pass of a chunk."""
        if self.together > 1:
            self._write_part(layer, key, value)
            return
        self.kernels.latent_write_(
            self.rows[layer], None, self.own_slots, key, value, self.gain, EPS, None,
            self.down, self.down_bias, self.pe, self.pe_bias, None, self.shape.heads,
        )  # fmt: skip

    def _write_part(self, layer, key, value):
        """Add a layer's part of a shared latent with torch, like the package; the last layer writes the sum."""
        key = self.kernels.qk_norm_rope(key, self.gain, EPS, None, self.shape.heads).flatten(2)
        part = F.linear(torch.cat([key, value], dim=-1), self.down, self.down_bias).float()
        self.parts = part if layer % self.together == 0 else self.parts + part
        if (layer + 1) % self.together == 0:
            frames = self.parts.to(key.dtype).unflatten(1, (self.shape.chunk, -1))
            self.rows[layer // self.together][:, self.own_slots.long()] = frames

    def bytes(self):
        return sum(rows.numel() * rows.element_size() for rows in self.rows)


def _label(way, run):
    """The label of `run` in the results; None stands for torch's own choice."""
    label = getattr(run, "label", TORCH)
    return _torch_label(way) if label == TORCH else label


def _torch_label(way):
    shape, kept = way.shape, way.keys if hasattr(way, "keys") else None
    key, value = (kept[0], way.values[0]) if kept else way.spaces[0]
    return f"{TORCH}: {torch_runs(key[:, : shape.queries], key, value)}"


class Step:
    """One pass through all transformer blocks: self-attention by a way, cross-attention to text, feed-forward."""

    def __init__(self, shape, device, dtype):
        self.shape = shape
        dim = shape.dim

        def weight(*sizes):
            return torch.randn(*sizes, device=device, dtype=dtype) * sizes[-1] ** -0.5

        self.blocks = [
            {
                "qkv": [weight(dim, dim) for _ in range(3)],
                "out": weight(dim, dim),
                "cross_q": weight(dim, dim),
                "cross_out": weight(dim, dim),
                "up": weight(shape.ffn, dim),
                "down": weight(dim, shape.ffn),
            }
            for _ in range(shape.layers)
        ]
        text = (shape.batch, shape.heads, shape.text, shape.head_dim)
        self.text = [torch.randn(text, device=device, dtype=dtype) for _ in range(2)]
        self.modulation = torch.randn(6, dim, device=device, dtype=torch.float32) * 0.02
        self.hidden_states = torch.randn(shape.batch, shape.queries, dim, device=device, dtype=dtype)

    def __call__(self, way, layers=None):
        """Hidden states after the first `layers` (default: all)."""
        x, heads = self.hidden_states, self.shape.heads
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.modulation
        for layer, block in enumerate(self.blocks[:layers]):
            normed = self._modulated(x, scale, shift)
            query, key, value = (F.linear(normed, weight) for weight in block["qkv"])
            out = way.attend(layer, query, key, value).flatten(2)
            x = (x.float() + F.linear(out, block["out"]).float() * gate).to(x.dtype)
            query = F.linear(x, block["cross_q"]).unflatten(-1, (heads, -1)).transpose(1, 2)
            out = F.scaled_dot_product_attention(query, *self.text).transpose(1, 2).flatten(2)
            x = x + F.linear(out, block["cross_out"])
            hidden = F.gelu(F.linear(self._modulated(x, ff_scale, ff_shift), block["up"]), approximate="tanh")
            x = (x.float() + F.linear(hidden, block["down"]).float() * ff_gate).to(x.dtype)
        return x

    def _modulated(self, x, scale, shift):
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=EPS)
        return torch.addcmul(shift, normed, 1 + scale).to(x.dtype)
