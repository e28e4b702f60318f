"""Every layer in turn: sampled, fitted and put away before the next one is read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from ..errors import UsageError, UserError
from .blocks import Blocks
from .budget import Curve, Trace, allot, candidate_ranks, measured_curve
from .calibrate import sweep
from .clips import INIT, CalibrationBatch, Clips, drawn, enter_clips
from .config import ConvertConfig
from .initialise import LayerInit, initialise_layer
from .probe import LayerSample
from .state import latent_attention
from .store import TensorStore

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


class Shelf(Protocol):
    """Where fitted layers are kept."""

    def __contains__(self, layer: object) -> bool: ...

    def get(self, layer: int) -> LayerInit:
        """What was put there for a layer."""
        ...

    def put(self, layer: int, block: Any, plan: LayerInit) -> None:
        """Keep the fit of `block`, number `layer`."""
        ...


class Plans:
    """A shelf in memory."""

    def __init__(self) -> None:
        self._plans: dict[int, LayerInit] = {}

    def __contains__(self, layer: object) -> bool:
        return layer in self._plans

    def get(self, layer: int) -> LayerInit:
        return self._plans[layer]

    def put(self, layer: int, block: Any, plan: LayerInit) -> None:
        self._plans[layer] = plan


class Ranks(NamedTuple):
    """`fitted` is the rank at which each layer is fitted, `measured` those whose error a budget wants to know."""

    fitted: list[int]
    measured: list[int]


def planned_ranks(blocks: Blocks, config: ConvertConfig) -> Ranks:
    """Every layer is fitted at its `kv_lora_rank`, or at the largest that a budget may choose.

    Raises UsageError for one that the model cannot have.
    """
    limit = _width(blocks)
    if config.budget is not None:
        measured = candidate_ranks(config.budget, _latent_scalars(blocks, config), limit)
        return Ranks([measured[-1]] * len(blocks), measured)
    try:
        ranks = config.ranks(len(blocks))
    except ValueError as error:
        raise UsageError(f"convert.kv_lora_rank: {error}") from None
    for layer, rank in enumerate(ranks):
        if not 1 <= rank <= limit:
            problem = f"{rank} in layer {layer} is not between 1 and {limit}, the width of [k; v]"
            raise UsageError(f"convert.kv_lora_rank: {problem}")
    return Ranks(ranks, [])


def final_ranks(blocks: Blocks, config: ConvertConfig, plans: Iterable[LayerInit]) -> list[int]:
    """Rank of every layer in the converted model. Raises UsageError if no ranks meet the budget."""
    if config.budget is None:
        return planned_ranks(blocks, config).fitted
    curves = [plan.curve for plan in plans]
    return allot([curve for curve in curves if curve is not None], config.budget, _latent_scalars(blocks, config))


def _width(blocks: Blocks) -> int:
    """Scalars of [k; v]."""
    return int(2 * blocks.model.config.num_attention_heads * blocks.model.config.attention_head_dim)


def _latent_scalars(blocks: Blocks, config: ConvertConfig) -> float | None:
    """Mean rank that the budget leaves beside a cached shared key; None where that is open."""
    assert config.budget is not None
    scalars = config.budget.scalars(_width(blocks))
    return None if scalars is None else scalars - config.cached_key


def convert_layers(
    blocks: Blocks,
    config: ConvertConfig,
    batches: Iterable[CalibrationBatch] | None,
    seed: int,
    shelf: Shelf,
    progress: Progress | None = None,
    work: Path | None = None,
) -> None:
    """Fit every layer that is not on the `shelf` yet and put it there.

    Memory is one block, its sample and, up to `store.IN_MEMORY_BYTES`, the hidden states of the
    `batches`; more of those go to files in `work`. Draws depend on seed, layer and batch alone, so that
    it does not matter which layers were done before. `progress` is told (what, done, of how many).
    Raises UsageError for ranks and shapes that the model does not have, UserError for clips that
    cannot be calibrated on.
    """
    run = _Layers(blocks, config, planned_ranks(blocks, config), seed, shelf, progress)
    wanted = [layer for layer in range(len(blocks)) if layer not in shelf]
    if not wanted:
        return
    if config.init != "activation":
        for layer in wanted:
            with blocks.open(layer) as block:
                run.visit(layer, block, None)
        return
    if batches is None:
        raise UserError("init: activation needs calibration clips; init: svd converts from the weights alone")
    store = TensorStore(None if work is None else work / "activations")
    try:
        clips = enter_clips(blocks, batches, config.calibration, store)
        history_only = config.own_chunk == "exact"
        sweep(blocks, clips, config.calibration, history_only, wanted, run.visit, run.ascended, *run.watch(clips))
    finally:
        store.clear()


class _Layers:
    def __init__(
        self,
        blocks: Blocks,
        config: ConvertConfig,
        ranks: Ranks,
        seed: int,
        shelf: Shelf,
        progress: Progress | None,
    ) -> None:
        self.axes = blocks.model.rotary_table().axes
        self.config, self.seed, self.shelf, self.progress = config, seed, shelf, progress
        self.ranks, self.candidates = ranks
        self.converted = config.init == "activation" and config.calibration.hidden_states == "converted"
        self.warned = False
        self.traces: list[Trace] = []
        self.teacher_losses: list[float] = []

    def watch(self, clips: Clips) -> tuple[Callable[[int, Tensor], None], Callable[[Trace], None]] | tuple[None, None]:
        """What a sweep has to tell for error curves: the teacher's velocity and each layer's traces."""
        if self.config.budget is None:
            return None, None

        def velocity(number: int, v: Tensor) -> None:
            self.teacher_losses.append(clips.loss(number, v))

        return velocity, self.traces.append

    def visit(self, layer: int, block: Any, sample: LayerSample | None) -> nn.Module | None:
        """Fit a layer; the converted attention where the layers above run on it."""
        if layer not in self.shelf:
            self.shelf.put(layer, block, self._fit(layer, block, sample))
            self._told("convert", sum(i in self.shelf for i in range(len(self.ranks))), len(self.ranks))
        if not self.converted:
            return None
        return latent_attention(block.attn1, self.shelf.get(layer), self.config, self.ranks[layer])

    def ascended(self, done: int, total: int) -> None:
        self._told("calibrate", done, total)

    def _fit(self, layer: int, block: Any, sample: LayerSample | None) -> LayerInit:
        rank = self.ranks[layer]
        if sample is not None and len(sample.hidden) < rank and not self.warned:
            self.warned = True
            tokens = f"layer {layer}: {len(sample.hidden)} calibration tokens do not determine a latent of rank {rank}"
            logger.warning("%s; use more calibration.clips, a larger max_tokens or a smaller rank", tokens)
        generator = drawn(INIT, self.seed, layer)
        try:
            plan = initialise_layer(block.attn1, sample, self.axes, self.config, rank, generator)
        except ValueError as error:
            raise UsageError(f"convert, layer {layer}: {error}") from None
        if self.config.budget is not None:
            plan.curve = self._curve(block.attn1, plan)
        return plan

    def _curve(self, attention: Any, plan: LayerInit) -> Curve:
        """What the layer's latents cost, as a rise of the teacher's loss."""
        assert self.config.budget is not None

        def latent(smaller: int) -> nn.Module:
            return latent_attention(attention, plan.truncated(smaller), self.config, smaller)

        loss = sum(self.teacher_losses) / len(self.teacher_losses)
        curve = measured_curve(attention, latent, self.candidates, self.traces)
        self.traces.clear()
        return [(smaller, error / loss) for smaller, error in curve]

    def _told(self, what: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(what, done, total)
