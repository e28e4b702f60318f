"""Divides the tokens of a chunk among the processes of a group, so that one video runs on several GPUs.

Every process holds the whole model and runs it on its own tokens. For self-attention, they exchange tokens for heads,
and afterwards heads for tokens (Ulysses, arXiv 2309.14509). What a chunk writes to the cache is gathered. Shape letters
as in `core.py`; P processes, S tokens of a chunk, S' of them in this process.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_COMPARED = 64
"""Numbers of a tensor that are compared among the processes."""
_ROUNDING = 0.05
"""Largest difference among processes, relative to the largest number: far above that of bfloat16."""


def check_group(group: ProcessGroup | None, heads: int) -> None:
    """Raise UserError unless the processes of `group`, None for one, can divide `heads` attention heads."""
    size = 1 if group is None else group.size()
    if heads % size:
        possible = ", ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
        raise UserError(f"{size} processes cannot divide {heads} attention heads equally; use one of {possible}")


class Share:
    """The share of one process in a chunk of `tokens` tokens: its own tokens, and its own heads of all tokens.

    Tokens need not divide equally: the first processes have one more. Raises ValueError for fewer tokens than
    processes.
    """

    def __init__(self, group: ProcessGroup, tokens: int) -> None:
        self.group, self.processes = group, group.size()
        if tokens < self.processes:
            raise ValueError(f"a chunk of {tokens} tokens cannot be divided among {self.processes} processes")
        each, more = divmod(tokens, self.processes)
        self.sizes = [each + (process < more) for process in range(self.processes)]
        ends = list(itertools.accumulate(self.sizes, initial=0))
        self.tokens = slice(ends[group.rank()], ends[group.rank() + 1])

    def heads(self, heads: int) -> slice:
        """The heads of this process, of a layer with `heads`."""
        each = heads // self.processes
        return slice(each * self.group.rank(), each * (self.group.rank() + 1))

    def runs(self, x: Tensor, tokens: int) -> Tensor:
        """`x` `[B, T, ...]` for T runs of equal length of `tokens` tokens, for the own tokens: `[B, 1 or S', ...]`."""
        if x.shape[1] == 1:
            return x
        own = torch.arange(self.tokens.start, self.tokens.stop, device=x.device)
        return x[:, own // (tokens // x.shape[1])]

    def to_heads(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Own heads of all tokens, `[B, S, H / P * D]` each, from all heads of the own tokens, `[B, S', H * D]` each.

        All are exchanged at once, in the dtype of the first.
        """
        parts = [x.unflatten(-1, (self.processes, -1)).permute(2, 1, 0, 3) for x in given]
        widths = [part.shape[-1] for part in parts]
        sent = given[0].new_empty(*parts[0].shape[:-1], sum(widths))
        for target, part in zip(sent.split(widths, dim=-1), parts, strict=True):
            target.copy_(part)
        received = self._exchange(sent.flatten(0, 1), self._own_sizes, self.sizes)
        return tuple(x.transpose(0, 1) for x in received.split(widths, dim=-1))

    def to_tokens(self, x: Tensor) -> Tensor:
        """The reverse of `to_heads`: `[B, S, H / P * D]` to `[B, S', H * D]`."""
        received = self._exchange(x.transpose(0, 1).contiguous(), self.sizes, self._own_sizes)
        return received.unflatten(0, (self.processes, -1)).permute(2, 1, 0, 3).flatten(2)

    def gather(self, x: Tensor) -> Tensor:
        """All tokens `[B, S, C]`, from the own tokens `[B, S', C]` of every process."""
        sent = x.transpose(0, 1).expand(self.processes, -1, -1, -1).flatten(0, 1)
        return self._exchange(sent, self._own_sizes, self.sizes).transpose(0, 1)

    def agree(self, numbers: Tensor) -> Tensor:
        """The largest of each of the `numbers` `[N]` in any process, float64 on the CPU; NaN if one is NaN."""
        own = numbers.double()
        found = [torch.empty_like(own) for _ in range(self.processes)]
        dist.all_gather(found, own, self.group)
        # On the host, NaN is the largest, whatever the backend's maximum makes of it.
        return torch.stack(found).cpu().amax(0)

    def check_same(self, x: Tensor) -> None:
        """Raise UserError where some numbers of `x`, which all processes should have, differ by more than rounding."""
        some = x.flatten()[:: -(-x.numel() // _COMPARED)]
        largest, negated_least = self.agree(torch.cat([some, -some])).chunk(2)
        if (largest + negated_least).max() > _ROUNDING * torch.maximum(largest, negated_least).max():
            raise UserError(
                "processes that share chunks began a video with different noise, prompts or weights; make the same "
                "calls with the same arguments and seeds in all of them"
            )

    @property
    def _own_sizes(self) -> list[int]:
        """The own tokens, once per process."""
        return [self.tokens.stop - self.tokens.start] * self.processes

    # A compiled block runs this between its graphs.
    @torch._disable_dynamo
    def _exchange(self, sent: Tensor, sizes: list[int], received_sizes: list[int]) -> Tensor:
        """Send `sizes` rows of contiguous `sent` `[rows, ...]` to the processes; returns those received, in order."""
        received = sent.new_empty(sum(received_sizes), *sent.shape[1:])
        dist.all_to_all_single(received, sent, received_sizes, sizes, self.group)
        return received
