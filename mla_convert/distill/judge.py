"""Judges the losses of a stage: whether a step is taken, and whether training goes on."""

from __future__ import annotations

import logging
import math

from ..errors import UserError
from .metrics import Row
from .sharding import from_main
from .stages.base import StageConfig
from .state import Checkpoints
from .watch import Watch

logger = logging.getLogger(__name__)


class Judge:
    """Acts on what `watch` remembers of a stage's losses; only the `main` process logs.

    Raises UserError, which names the last good checkpoint, if training has diverged.
    """

    def __init__(self, config: StageConfig, watch: Watch, checkpoints: Checkpoints, main: bool) -> None:
        self.config, self.watch, self.checkpoints, self.main = config, watch, checkpoints, main

    def training(self, step: int, network: str, loss: float, grad_norm: float | None) -> Row:
        """The entries of the step's row about a spike; `skipped` is set if the step must not be taken.

        `network` is the name of the one that is trained. The norm is None after an fp16 overflow.
        """
        what = "" if network == "student" else f"{network} "
        self._require_finite(step, f"{what}loss", loss)
        if grad_norm is not None:
            self._require_finite(step, f"{what}gradient norm", grad_norm)
        times, spike = self.watch.spike_of(network, loss), self.config.spike
        if times is None or spike is None:
            return {}
        seen = f"{what}loss is {loss:.4g}, {times:.1f} times the median of the last {spike.window} losses,"
        if spike.action == "stop":
            raise self._diverged(step, seen)
        skipped = spike.action == "skip"
        if self.main:
            then = "; the optimizer step is skipped" if skipped else ""
            logger.warning(f"stage {self.config.stage}: {seen} at step {step}{then}")
        return {"spike": times, "skipped": True} if skipped else {"spike": times}

    def heldout(self, step: int, loss: float) -> None:
        """Take note of the held-out loss after `step`; the one before the first step only has to be finite."""
        self._require_finite(step, "held-out loss", loss)
        if step > 0:
            # Different GPUs may round differently, and all processes must stop at the same step.
            self.watch.heldout(from_main(loss))

    def _require_finite(self, step: int, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise self._diverged(step, f"{what} is {value}")

    def _diverged(self, step: int, what: str) -> UserError:
        kept = self.checkpoints.newest()
        where = f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet"
        return UserError(
            f"stage {self.config.stage} diverged: {what} at step {step}; {where}; "
            "lower learning_rate, lengthen warmup_steps or set max_grad_norm"
        )
