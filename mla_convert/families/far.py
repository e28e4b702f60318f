"""Implements windows, cache and passes of FAR: near history in full, far history in coarse patches.

A chunk sees the `limit - 1` chunks before it in full and everything older compressed, i.e. in coarser patches
(FAR, arXiv 2503.19325; the layout is diffusers' `AnyFlowFARTransformer3DModel`). When a chunk is finished, the near
history is encoded again, because its own history has just become coarser. This is a stage of the cache: stage s follows
chunk s. Compressed frames never change. In a list of frames, a compressed frame f appears as `~f`. Shape letters:
S tokens, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..mla.attention import AttentionPass, ChunkView, chunk_pass, token_slices
from ..mla.cache import FrameCache
from ..mla.places import Places
from ..mla.rope import RotaryTable, sent
from ..mla.window import CausalConfig, Chunk

Bounds = list[Chunk]
# Stock inference pads with zero keys up to a multiple of this many queries, and attends to them.
PADDED_TO = 128


@dataclass(frozen=True)
class FarGrid:
    """Rotary tables and token grids (rows, columns) of a frame, in full and compressed."""

    full: RotaryTable
    compressed: RotaryTable
    full_size: tuple[int, int]
    compressed_size: tuple[int, int]

    @property
    def full_tokens(self) -> int:
        return self.full_size[0] * self.full_size[1]

    @property
    def compressed_tokens(self) -> int:
        return self.compressed_size[0] * self.compressed_size[1]

    def to(self, device: torch.device | str) -> FarGrid:
        """A copy with its rotations on `device`."""
        return replace(self, full=self.full.to(device), compressed=self.compressed.to(device))

    def rotations(self, frames: list[int], causal: CausalConfig, stop: int) -> Tensor:
        """Complex64 rotations `[S, P]` of `frames`, `~f` for compressed, as seen by the chunk that ends at `stop`."""
        far, near = split_frames(frames)
        return torch.cat(
            [
                self.compressed.rotations(causal.temporal_index(far, stop), *self.compressed_size),
                self.full.rotations(causal.temporal_index(near, stop), *self.full_size),
            ]
        )

    def grid_rotations(self, far_frames: int, near_frames: int) -> Tensor:
        """Rotations that depend only on the place in the frame, compressed frames first."""
        far = self.compressed.rotations([0] * far_frames, *self.compressed_size)
        return torch.cat([far, self.full.rotations([0] * near_frames, *self.full_size)])

    def zero_keys(self, frames: int) -> int:
        """Number of zero keys that a chunk of `frames` frames attends to while it is denoised."""
        return -frames * self.full_tokens % PADDED_TO


def compressed_table(table: RotaryTable, downscale: tuple[int, int, int]) -> RotaryTable:
    """The table of coarse patches: the normalized mean rotation of the `downscale` fine patches that each covers."""
    # On the CPU, because MPS has no complex128.
    factors = torch.tensor([downscale[axis] for axis in table.axes])
    angles = table.cis[1].cpu().to(torch.complex128).angle()
    index = torch.arange(table.max_len, dtype=angles.dtype).unsqueeze(1)
    total = torch.zeros(table.cis.shape, dtype=torch.complex128)
    for offset in range(max(downscale)):
        turned = torch.polar(torch.ones_like(total.real), (index * factors + offset) * angles)
        total += torch.where(offset < factors, turned, 0)
    return RotaryTable((total / total.abs()).to(torch.complex64).to(table.cis.device), table.axes)


def split_frames(frames: list[int]) -> tuple[list[int], list[int]]:
    """Split `frames` into compressed and full ones, both as indices in the video."""
    return [~frame for frame in frames if frame < 0], [frame for frame in frames if frame >= 0]


@dataclass(frozen=True)
class FarWindow:
    """The frames that each pass of a rollout sees; `limit` counts the full chunks, including the current one."""

    causal: CausalConfig
    limit: int

    def near(self, bounds: Bounds, stage: int) -> int:
        """The first frame that is in full at a stage."""
        first = stage - self.limit + 2
        return bounds[first].start if first > 0 else 0

    def denoised(self, bounds: Bounds, chunk: int) -> list[int]:
        """The history that a chunk sees while it is denoised."""
        near = self.near(bounds, chunk - 1) if chunk else 0
        return [frame if frame >= near else ~frame for frame in self.causal.history(*bounds[chunk])]

    def encoded(self, bounds: Bounds, stage: int, chunk: int) -> list[int]:
        """The history that a chunk sees while it is encoded at a stage."""
        near, end = self.near(bounds, stage), bounds[stage].stop
        seen = self.causal.history(end, end + 1)
        return [frame if frame >= near else ~frame for frame in seen if frame < bounds[chunk].start]

    def demoted(self, stage: int) -> int | None:
        """The chunk that a stage compresses, if any."""
        chunk = stage - self.limit + 1
        return chunk if chunk >= 0 else None

    def kept(self, stage: int) -> range:
        """The chunks that are in full at a stage."""
        return range(max(0, stage - self.limit + 2), stage + 1)


class FarCache(FrameCache):
    """A cache of rows `[B, slots, row]` per layer, compressed frames before full ones.

    `frames` is the capacity (compressed, full). Compressed frames form a ring after the sinks. Full frames are written
    again at every stage. `recent` holds the inputs of the next stage: the latents `[B, C, F, H, W]` of the last chunks
    and their timesteps.
    """

    is_ring = False

    def __init__(
        self,
        window: FarWindow,
        row_widths: list[int],
        batch_size: int,
        grid: FarGrid,
        frames: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        # The model may still be on another device: the hooks of offloading move it when it is called.
        self.window, self.grid = window, grid.to(device)
        self.far_frames, self.near_frames = frames
        slots = self.far_frames * grid.compressed_tokens + self.near_frames * grid.full_tokens
        rows = [torch.zeros(batch_size, slots, width, dtype=dtype, device=device) for width in row_widths]
        self._begin(window.causal, *grid.full_size, rows)

    def reset(self) -> None:
        super().reset()
        self.bounds: Bounds = []
        self.recent: list[tuple[Tensor, Tensor]] = []

    def _take(self, kept: Tensor, slots: Tensor) -> Tensor:
        return kept.index_select(1, slots)

    def _put(self, kept: Tensor, slots: Tensor, new: Tensor) -> None:
        kept.index_copy_(1, slots, new)

    def slots(self, frames: list[int]) -> Tensor:
        """Slots of the tokens of `frames`, int64, compressed frames first, as in the passes.

        Raises ValueError for more frames than fit.
        """
        far, near = split_frames(frames)
        if len(far) > self.far_frames or len(near) > self.near_frames:
            raise ValueError(
                f"the cache holds {self.far_frames} compressed and {self.near_frames} full frames, but this rollout "
                f"needs {len(far)} and {len(near)}; make chunks of num_frames_per_block frames"
            )
        coarse, fine = self.grid.compressed_tokens, self.grid.full_tokens
        sinks = self.causal.sink_frames
        starts = [f if f < sinks else sinks + (f - sinks) % max(1, self.far_frames - sinks) for f in far]
        full_start = self.far_frames * coarse
        slots = torch.cat(
            [
                _spans([coarse * slot for slot in starts], coarse),
                _spans([full_start + fine * (f % self.near_frames) for f in near], fine),
            ]
        )
        return sent(slots, self.rows[0].device)


def _spans(starts: list[int], length: int) -> Tensor:
    return (torch.tensor(starts, dtype=torch.long).unsqueeze(1) + torch.arange(length)).flatten()


# A compiled graph would be valid for the frames of one chunk only.
@torch._disable_dynamo
def denoise_pass(cache: FarCache, frames: int) -> AttentionPass:
    """Pass that denoises the next chunk of a rollout, of `frames` frames, without writing it."""
    start = cache.frames_seen
    chunk = Chunk(start, start + frames)

    def places() -> Places:
        bounds = [*cache.bounds, chunk]
        history = cache.window.denoised(bounds, len(bounds) - 1)
        return _places(cache, list(range(*chunk)), history, chunk.stop, write=False)

    return chunk_pass(cache, chunk, cache.places.of(chunk, places), False, cache.grid.zero_keys(frames))


def encode_pass(cache: FarCache, stage: int, chunk: int, compressed: bool) -> AttentionPass:
    """Pass that writes one chunk in the form in which a stage caches it."""
    bounds = cache.bounds[chunk]
    own = [~frame if compressed else frame for frame in range(*bounds)]
    history = cache.window.encoded(cache.bounds, stage, chunk)
    places = _places(cache, own, history, cache.bounds[stage].stop + 1, write=True)
    return chunk_pass(cache, bounds, places, write=True)


def _places(cache: FarCache, own: list[int], history: list[int], stop: int, write: bool) -> Places:
    """The places of `own` frames and their `history`, as seen by the chunk that ends at `stop`."""
    grid, causal = cache.grid, cache.causal
    far, near = split_frames(own)
    # A chunk gets slots only when it is written.
    seen, slots = cache.slots(history), cache.slots(own if write else [])
    return Places(
        torch.cat([grid.rotations(history, causal, stop), grid.rotations(own, causal, stop)]),
        grid.grid_rotations(len(far), len(near)),
        torch.cat([seen, slots]),
        # Every token has a slot.
        len(seen),
        len(seen),
    )


@dataclass(frozen=True)
class FarClip:
    """A clip as one sequence: compressed history, full history stage by stage, then the chunks themselves.

    `far` and `near` are the frames of the history in the order of their tokens; `step` is the pass.
    """

    far: list[int]
    near: list[int]
    step: AttentionPass


def clip_layout(window: FarWindow, grid: FarGrid, num_frames: int) -> FarClip:
    """Pack a clip of `num_frames` frames so that every chunk sees the same history as in a rollout."""
    causal, bounds = window.causal, window.causal.chunks(num_frames)
    stages = range(len(bounds) - 1)
    demoted = [(stage, chunk) for stage in stages if (chunk := window.demoted(stage)) is not None]
    kept = [(stage, chunk) for stage in stages for chunk in window.kept(stage)]
    far = [frame for _, chunk in demoted for frame in range(*bounds[chunk])]
    near = [frame for _, chunk in kept for frame in range(*bounds[chunk])]
    position, starts = len(far) * grid.compressed_tokens, {}
    for stage, chunk in kept:
        starts[stage, chunk] = position
        position += (bounds[chunk].stop - bounds[chunk].start) * grid.full_tokens
    history_end = position

    def view(own: slice, frames: list[int], names: list[int], stage: int, stop: int, zero_keys: int = 0) -> ChunkView:
        coarse, fine = split_frames(names)
        slices = token_slices(coarse, grid.compressed_tokens)
        if fine:
            first = window.kept(stage)[0]
            shift = starts[stage, first] - bounds[first].start * grid.full_tokens
            slices += tuple(slice(s.start + shift, s.stop + shift) for s in token_slices(fine, grid.full_tokens))
        return ChunkView(
            own,
            slices,
            grid.rotations(frames, causal, stop),
            grid.rotations(names, causal, stop),
            zero_keys,
        )

    views = []
    for stage, chunk in demoted:
        frames = list(range(*bounds[chunk]))
        own = slice(frames[0] * grid.compressed_tokens, (frames[-1] + 1) * grid.compressed_tokens)
        names = window.encoded(bounds, stage, chunk)
        views.append(view(own, [~frame for frame in frames], names, stage, bounds[stage].stop + 1))
    for stage, chunk in kept:
        frames = list(range(*bounds[chunk]))
        start = starts[stage, chunk]
        own = slice(start, start + len(frames) * grid.full_tokens)
        views.append(view(own, frames, window.encoded(bounds, stage, chunk), stage, bounds[stage].stop + 1))
    for chunk, (start, stop) in enumerate(bounds):
        own = slice(history_end + start * grid.full_tokens, history_end + stop * grid.full_tokens)
        names = window.denoised(bounds, chunk)
        views.append(view(own, list(range(start, stop)), names, chunk - 1, stop, grid.zero_keys(stop - start)))
    rotations = grid.grid_rotations(len(far), len(near) + num_frames)
    return FarClip(far, near, AttentionPass(views, rotations, cached=slice(0, history_end)))
