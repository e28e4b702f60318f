"""Determines the length of a rollout, and checks its start."""

from __future__ import annotations

from torch import Tensor

from ..errors import UsageError
from ..mla.window import CausalConfig


def video_end(causal: CausalConfig, positions: int, num_frames: int | None, given: int = 0) -> int | None:
    """The final length of a rollout, given a rotary table of `positions`; None if it is endless.

    With absolute positions, a rollout without `num_frames` ends at the last whole chunk within the table. Raises
    UsageError if `num_frames`, or the `given` frames that it starts with, exceed the table.
    """
    longest = causal.longest(positions)
    if longest is None:
        return num_frames
    whole = causal.chunk_end(0)
    asked = max(whole if num_frames is None else num_frames, given)
    if asked > longest:
        raise UsageError(
            f"{asked} latent frames are more than the rotary table's {longest} positions; make a shorter video, or "
            f"{_remedy(causal)}"
        )
    return longest - (longest - whole) % causal.num_frames_per_block if num_frames is None else num_frames


def end_notice(causal: CausalConfig, what: str, frames: int | None) -> str:
    """The warning that `what`, meant to be endless, ends after `frames` frames, with the remedy."""
    return f"{what} ends after {frames} latent frames, with the rotary table; {_remedy(causal)}"


def _remedy(causal: CausalConfig) -> str:
    if causal.sink_positions == "absolute":
        return "set causal.sink_positions: window for endless videos"
    return f"reduce causal.window_frames, now {causal.window_frames}, to at most the table's positions"


def check_start(
    start: Tensor,
    causal: CausalConfig,
    num_frames: int | None,
    shape: tuple[int, int, int],
    whole_chunks: bool = True,
) -> None:
    """Raise UsageError unless a rollout of `shape` (C, H, W) can begin with `start` `[B, C, F0, H, W]`."""
    channels, frames, height, width = start.shape[1:]
    check_size("the start", (channels, height, width), shape, "the latent size of the start")
    # Only the chunks up to the start's end and the next: the rollout may be of any length.
    few = frames + causal.num_frames_per_block
    ends = [stop for _, stop in causal.chunks(few if num_frames is None else min(num_frames, few))]
    if num_frames is not None and frames > num_frames:
        raise UsageError(
            f"the start has {frames} frames, more than the {num_frames} of the rollout; raise num_frames (--frames)"
        )
    if whole_chunks and frames not in ends:
        shorter = [end for end in ends if end < frames]
        longer = [end for end in ends if end > frames]
        fitting = " or ".join(map(str, [*shorter[-1:], *longer[:1]]))
        raise UsageError(
            f"a start of {frames} frames does not end with a chunk; give {fitting} latent frames, or hold_start "
            "(--hold-start), which lets it end inside one"
        )


def check_size(what: str, found: tuple[int, int, int], shape: tuple[int, int, int], own_size: str) -> None:
    """Raise UsageError unless the (C, H, W) `found` of `what` is the `shape` of the rollout."""
    if found != shape:
        given, wanted = (f"{c} channels of {h}x{w}" for c, h, w in (found, shape))
        raise UsageError(f"{what} has {given}, the rollout {wanted}; roll out at {own_size}")
