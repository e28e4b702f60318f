"""Choose each layer's rank from measured error curves, for the least total error at equal memory.

A layer's curve gives the error of its latent at each rank. It is measured as the change `do` of the self-attention's
output on calibration clips, with the exact softmax, times the gradient of a random projection of the velocity. That
product is summed over a clip, its clean context and noisy copies together. The expected square of the sum is the
squared error of the clip's velocity that this layer alone causes. The layers after it are taken to first order.
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
    """One forward of a dense self-attention: `hidden_states` and each probe's `output_grads`, all `[B, S, C]`."""

    hidden_states: Tensor
    step: AttentionPass
    output_grads: list[Tensor]


def candidate_ranks(budget: Budget, scalars: float | None, limit: int) -> list[int]:
    """Return at most `MEASURED_RANKS` ranks at which curves are measured, rising; the last is the largest possible.

    `scalars` is the mean rank of a latent under the budget, None for a `loss_increase`. `limit` is how many numbers a
    latent encodes. Raises UsageError if that leaves no room for a single `rank_multiple`.
    """
    step = budget.rank_multiple
    largest = min(limit, 2 * math.ceil((limit / 8 if scalars is None else scalars) / step) * step) // step
    if largest < 1 or (scalars is not None and scalars < step):
        room = f"{limit if scalars is None else scalars:g} scalars per token"
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
    """Measure `(rank, squared error)` of one latent at each of `ranks`, in the unit of the traces' gradients squared.

    The error is the mean over clips. `dense` are the layers that share the latent. `latent_of_rank` returns their
    latent forms at a rank, and `traces` lists their forward passes layer by layer.
    """
    curve: Curve = []
    batches = list(zip(*traces, strict=True))
    expected = [
        [layer(trace.hidden_states, None, None, trace.step) for layer, trace in zip(dense, batch, strict=True)]
        for batch in batches
    ]
    for rank in ranks:
        layers, total, clips = latent_of_rank(rank), 0.0, 0
        for batch, outs in zip(batches, expected, strict=True):
            step = reading_together(layers, [trace.hidden_states for trace in batch], batch[0].step)
            error = torch.zeros(())
            for layer, trace, out in zip(layers, batch, outs, strict=True):
                change = (layer(trace.hidden_states, None, None, step) - out).float()
                error = error + torch.stack([(change * g.float()).sum((1, 2)) for g in trace.output_grads]).cpu()
            # A clip's context and its noisy copies change one velocity, so their errors may cancel.
            by_clip = error.double().unflatten(1, (-1, step.context_batch or error.shape[1])).sum(1)
            total += float(by_clip.square().sum()) / len(error)
            clips += by_clip.shape[1]
        curve.append((rank, total / clips))
    return curve


def allot(curves: Sequence[Curve], budget: Budget, scalars: float | None) -> list[int]:
    """A rank for every latent: multiples of `rank_multiple` within the measured ranks.

    Every latent starts at the smallest rank. The increase that lowers the summed error most per scalar comes next,
    until the mean rank is `scalars` or the sum is at most `loss_increase`. Raises UsageError if no measured ranks reach
    the `loss_increase`.
    """
    step = budget.rank_multiple
    ladders = [_ladder(curve, step) for curve in curves]
    rungs = [0] * len(ladders)
    room = None if scalars is None else int(round(scalars * len(ladders), 6)) // step - len(ladders)

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
            f"convert.budget.loss_increase: {budget.loss_increase:g} is out of reach, the largest measured ranks "
            f"give {total():.3g}; raise it, or set scalars_per_token"
        )
    return [step * (rung + 1) for rung in rungs]


def _ladder(curve: Curve, step: int) -> list[float]:
    """The error at ranks `step`, `2 step`, ...: interpolated in its logarithm, and never rising."""
    ranks, errors = zip(*curve, strict=True)
    every = np.arange(step, ranks[-1] + 1, step)
    logs = np.interp(every, ranks, np.log(np.maximum(errors, 1e-30)))
    return [float(error) for error in np.minimum.accumulate(np.exp(logs))]
