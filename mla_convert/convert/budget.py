"""Ranks by layer from measured error curves, so that the whole is best at equal memory.

A layer's curve says what its latents cost at each rank: the change `do` of the self-attention's
output on calibration clips, the exact softmax included, times the gradient of a random projection of
the velocity. The expected square of that product summed over a clip is the squared error of the
velocity that this layer alone causes, to first order behind the layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..mla.attention import AttentionPass
from ..mla.latent import reading_together
from .config import Budget

MEASURED_RANKS = 8

Curve = list[tuple[int, float]]


class Trace(NamedTuple):
    """One forward of a dense self-attention: `hidden_states` and, of each probe, `output_grads` `[B, S, C]`."""

    hidden_states: Tensor
    step: AttentionPass
    output_grads: list[Tensor]


def candidate_ranks(budget: Budget, scalars: float | None, limit: int) -> list[int]:
    """At most `MEASURED_RANKS` ranks at which curves are measured, rising; the last is the largest on offer.

    `scalars` is the mean rank that the budget leaves a latent, None if that is open; `limit` how many numbers
    it encodes.
    Raises UsageError if there is no room for a single multiple.
    """
    step = budget.rank_multiple
    largest = min(limit, 2 * math.ceil((limit / 8 if scalars is None else scalars) / step) * step) // step
    if largest < 1 or (scalars is not None and scalars < step):
        room = f"{limit if scalars is None else scalars:g} scalars a token"
        raise UsageError(f"convert.budget: {room} are less than rank_multiple {step}; lower rank_multiple")
    spread = np.geomspace(1, largest, min(MEASURED_RANKS, largest)).round().astype(int)
    return [step * int(count) for count in np.unique(spread)]


@torch.no_grad()
def measured_curve(
    dense: Sequence[nn.Module],
    latent_of_rank: Callable[[int], Sequence[Any]],
    ranks: Sequence[int],
    traces: Sequence[Sequence[Trace]],
) -> Curve:
    """`(rank, squared error)` at each rank of a latent; the unit is that of the traces' gradients squared.

    The layers that share it are `dense`, `traces` lists their forwards layer by layer.
    """
    curve: Curve = []
    batches = list(zip(*traces, strict=True))
    expected = [
        [layer(trace.hidden_states, None, None, trace.step) for layer, trace in zip(dense, batch, strict=True)]
        for batch in batches
    ]
    for rank in ranks:
        layers, total = latent_of_rank(rank), 0.0
        for batch, outs in zip(batches, expected, strict=True):
            step = reading_together(layers, [trace.hidden_states for trace in batch], batch[0].step)
            error = torch.zeros(())
            for layer, trace, out in zip(layers, batch, outs, strict=True):
                change = (layer(trace.hidden_states, None, None, step) - out).float()
                error = error + torch.stack([(change * g.float()).sum((1, 2)) for g in trace.output_grads]).cpu()
            total += float(error.double().square().sum()) / len(error)
        curve.append((rank, total / len(batches)))
    return curve


def allot(curves: Sequence[Curve], budget: Budget, scalars: float | None) -> list[int]:
    """A rank for every latent, multiples of `rank_multiple` within the ranks that were measured.

    Starting from the smallest, what lowers the summed error most for each further scalar comes next,
    until the mean is `scalars` or the sum is at most `loss_increase`. Raises UsageError if the curves
    do not reach that.
    """
    step = budget.rank_multiple
    ladders = [_ladder(curve, step) for curve in curves]
    rungs = [0] * len(ladders)
    room = None if scalars is None else int(scalars * len(ladders)) // step - len(ladders)

    def total() -> float:
        return sum(ladder[rung] for ladder, rung in zip(ladders, rungs, strict=True))

    while budget.loss_increase is None or total() > budget.loss_increase:
        best = (0.0, 0, 0)
        for layer, (ladder, rung) in enumerate(zip(ladders, rungs, strict=True)):
            for higher in range(rung + 1, len(ladder)):
                if room is None or higher - rung <= room:
                    best = max(best, ((ladder[rung] - ladder[higher]) / (higher - rung), layer, higher))
        gain, layer, higher = best
        if gain <= 0:
            break
        if room is not None:
            room -= higher - rungs[layer]
        rungs[layer] = higher
    if budget.loss_increase is not None and total() > budget.loss_increase:
        raise UsageError(
            f"convert.budget.loss_increase: {budget.loss_increase:g} is out of reach, the largest ranks measured "
            f"give {total():.3g}; allow more, or set scalars_per_token"
        )
    return [step * (rung + 1) for rung in rungs]


def _ladder(curve: Curve, step: int) -> list[float]:
    """Error at `step`, `2 step`, ...: interpolated in the logarithm, never rising."""
    ranks, errors = zip(*curve, strict=True)
    every = np.arange(step, ranks[-1] + 1, step)
    logs = np.interp(every, ranks, np.log(np.maximum(errors, 1e-30)))
    return [float(error) for error in np.minimum.accumulate(np.exp(logs))]
