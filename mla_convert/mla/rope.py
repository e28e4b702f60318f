"""Computes rotary positions of the tokens of a video: one complex rotation per channel pair.

Pairs are interleaved channels `(2p, 2p+1)`. Pair p belongs to one of the axes time, height, width
(RoPE, arXiv 2104.09864; the three-axis split is Wan's). Shape letters: S tokens, H heads, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

TIME, HEIGHT, WIDTH = 0, 1, 2


@dataclass(frozen=True)
class RotaryTable:
    """Unit complex rotations of every pair by index, and the axis of each pair.

    `cis` is complex64 `[max_len, P]`; `axes` holds P values of TIME, HEIGHT or WIDTH.
    """

    cis: Tensor
    axes: tuple[int, ...]

    @property
    def max_len(self) -> int:
        return self.cis.shape[0]

    def to(self, device: torch.device | str) -> RotaryTable:
        """The table on a device, such as the one that weights are offloaded from between calls."""
        return replace(self, cis=self.cis.to(device))

    def rotations(self, frames: list[int], height: int, width: int) -> Tensor:
        """Rotations of all tokens of a grid: complex64 `[len(frames) * height * width, P]`.

        Raises IndexError when an index is outside the table.
        """
        longest = max([*frames, height - 1, width - 1], default=0)
        if longest >= self.max_len:
            raise IndexError(f"rotary index {longest} is outside the table of {self.max_len} positions")
        axes = sent(torch.tensor(self.axes), self.cis.device)
        # Copy only the frame indices to the device.
        time = self.cis[sent(torch.tensor(frames, dtype=torch.long), self.cis.device)].view(-1, 1, 1, len(self.axes))
        row, column = self.cis[:height].unsqueeze(1), self.cis[:width]
        return torch.where(axes == TIME, time, torch.where(axes == HEIGHT, row, column)).flatten(0, 2)


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`; CUDA has copied it aside when this returns, so the host need not wait for the GPU."""
    return x.to(device, non_blocking=device.type == "cuda")


def wan_rotary_table(rope: Any) -> RotaryTable:
    """The table in the two `[max_len, head_dim]` buffers of diffusers' `WanRotaryPosEmbed`."""
    cis = torch.complex(rope.freqs_cos[:, 0::2].float(), rope.freqs_sin[:, 1::2].float())
    return RotaryTable(cis, (TIME,) * (rope.t_dim // 2) + (HEIGHT,) * (rope.h_dim // 2) + (WIDTH,) * (rope.w_dim // 2))


def split_rotary_table(cis: Tensor, head_dim: int) -> RotaryTable:
    """The table for complex `cis` `[max_len, head_dim / 2]`, with Wan's split of pairs into time, height and width."""
    spatial = head_dim // 6
    return RotaryTable(cis, (TIME,) * (head_dim // 2 - 2 * spatial) + (HEIGHT,) * spatial + (WIDTH,) * spatial)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate the channel pairs of `x` `[B, S, H, 2P]` by complex `rotations` `[S, P]` or `[B, S, P]`.

    The product is computed in float32 and returned in the dtype of `x`.
    """
    pairs = torch.view_as_complex(x.float().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations.unsqueeze(-2)).flatten(-2).to(x.dtype)
