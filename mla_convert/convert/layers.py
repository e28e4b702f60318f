"""Convert the layers one by one: each is sampled, fitted and stored before the next one is read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from ..draws import Use, drawn
from ..errors import UsageError, UserError
from ..families.base import AttentionGeometry
from ..mla.config import latent_groups
from .blocks import Blocks, give_back_memory
from .budget import Curve, Trace, allot, measured_curve
from .calibrate import Visitor, sweep
from .clips import CalibrationBatch, enter_clips
from .config import ConvertConfig
from .initialize import LayerInit, LayerReading, initialize_layers, read_layer
from .limits import Ranks, latent_scalars, planned_ranks
from .probe import LayerSample
from .state import ATTENTION, latent_attention
from .store import TensorStore

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


class Shelf(Protocol):
    """Storage for fitted layers."""

    def __contains__(self, layer: object) -> bool: ...

    def get(self, layer: int) -> LayerInit:
        """The fit of a layer."""
        ...

    def put(self, layer: int, dense: Mapping[str, Tensor], plan: LayerInit) -> None:
        """Store the fit of block number `layer`, whose dense state is `dense`."""
        ...


class Plans:
    """A `Shelf` in memory."""

    def __init__(self) -> None:
        self._plans: dict[int, LayerInit] = {}

    def __contains__(self, layer: object) -> bool:
        return layer in self._plans

    def get(self, layer: int) -> LayerInit:
        return self._plans[layer]

    def put(self, layer: int, dense: Mapping[str, Tensor], plan: LayerInit) -> None:
        dtype = dense[f"{ATTENTION}.to_k.weight"].dtype
        self._plans[layer] = replace(plan, tensors={name: tensor.to(dtype) for name, tensor in plan.tensors.items()})


def ranks_of(blocks: Blocks, config: ConvertConfig) -> Ranks:
    """The `planned_ranks` of a model's `blocks`. Raises UsageError for ranks that the model cannot have."""
    return planned_ranks(_geometry(blocks), blocks.model.rotary_table().axes, config)


def final_ranks(blocks: Blocks, config: ConvertConfig, plans: Iterable[LayerInit]) -> list[int]:
    """The rank of every layer in the converted model. Raises UsageError if no ranks meet the budget."""
    if config.budget is None:
        return config.ranks(len(blocks))
    curves = [plan.curve for plan in plans]
    measured = [curve for curve in curves if curve is not None]
    return config.for_layers(allot(measured, config.budget, latent_scalars(_geometry(blocks), config)))


def _geometry(blocks: Blocks) -> AttentionGeometry:
    model = blocks.model.config
    return AttentionGeometry(len(blocks), model.num_attention_heads, model.attention_head_dim)


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

    Memory holds one block and its sample (or the samples of all layers that share its latent), and up to
    `store.IN_MEMORY_BYTES` of the hidden states of the `batches`. The rest of those goes to files in `work`. Random
    draws depend only on seed, layer and batch, so a resumed conversion gives the same fit. `progress` is called with
    (phase, done, total). Raises UsageError for ranks and shapes that the model cannot have, and UserError for
    clips that cannot be calibrated on.
    """
    ranks = ranks_of(blocks, config)
    groups = latent_groups(len(blocks), config.layers_per_latent)
    unfitted = (layers for layers in groups if any(layer not in shelf for layer in layers))
    group_of = {layer: layers for layers in unfitted for layer in layers}
    wanted = list(group_of)
    if not wanted:
        return
    run = _Layers(blocks, config, ranks, seed, shelf, progress, group_of)
    if config.init != "activation":
        for layer in wanted:
            with blocks.open(layer) as block:
                run.visit(layer, block, None)
            run.visited(layer)
        return
    if batches is None:
        raise UserError("init: activation needs calibration clips; init: svd converts from the weights alone")
    store = TensorStore(None if work is None else work / "activations", device=blocks.model.device)
    try:
        clips = enter_clips(blocks, batches, config.calibration, store)
        blocks.entered()
        sweep(
            blocks,
            clips,
            config.calibration,
            config.own_chunk == "exact",
            wanted,
            run,
            layers_per_latent=config.layers_per_latent,
            rotated_only=config.position == "rotate_on_read",
            queries=config.q_lora_rank is not None,
        )
    finally:
        store.clear()


class _Layers(Visitor):
    """Fits what a sweep shows; `group_of` maps each layer to be fitted to all layers that share its latent."""

    def __init__(
        self,
        blocks: Blocks,
        config: ConvertConfig,
        ranks: Ranks,
        seed: int,
        shelf: Shelf,
        progress: Progress | None,
        group_of: dict[int, range],
    ) -> None:
        self.blocks, self.axes = blocks, blocks.model.rotary_table().axes
        self.config, self.seed, self.shelf, self.progress, self.group_of = config, seed, shelf, progress, group_of
        self.ranks, self.candidates = ranks
        self.readings: dict[int, LayerReading] = {}
        self.converted = config.init == "activation" and config.calibration.hidden_states == "converted"
        self.warned, self.wants_traces = False, config.budget is not None
        self.traces: dict[int, list[Trace]] = {}
        self.new_traces: list[Trace] = []
        self.summed_loss, self.clips = 0.0, 0

    def visit(self, layer: int, block: Any, sample: LayerSample | None) -> nn.Module | None:
        """Read a layer's fitting targets; return its converted attention if the layers above run on that."""
        if layer in self.group_of:
            self._read(layer, block, sample)
        if not self.converted:
            return None
        self.visited(layer)
        return latent_attention(block.attn1, self.shelf.get(layer), self.config, self.ranks[layer])

    def visited(self, layer: int) -> None:
        """Fit a layer and those that share its latent, as soon as all of them were read."""
        layers = self.group_of.get(layer, ())
        if layers and all(other in self.readings for other in layers):
            self._fit(layers)

    def passed(self, done: int, total: int) -> None:
        self._report("calibrate", done, total)

    def loss(self, loss: float, clips: int) -> None:
        self.summed_loss += clips * loss
        self.clips += clips

    def trace(self, trace: Trace) -> None:
        self.new_traces.append(trace)

    def _read(self, layer: int, block: Any, sample: LayerSample | None) -> None:
        rank = self.ranks[layer]
        if sample is not None and len(sample.hidden) < rank and not self.warned:
            self.warned = True
            tokens = f"layer {layer}: {len(sample.hidden)} calibration tokens do not determine a latent of rank {rank}"
            logger.warning("%s; use more calibration.clips, a larger max_tokens or a smaller rank", tokens)
        generator = drawn(Use.INIT, self.seed, layer)
        try:
            self.readings[layer] = read_layer(block.attn1, sample, self.axes, self.config, generator)
        except ValueError as error:
            raise UsageError(f"convert, layer {layer}: {error}") from None
        self.traces[layer] = list(self.new_traces)
        self.new_traces.clear()

    def _fit(self, layers: range) -> None:
        """Fit the `layers` of one latent and put them on the shelf."""
        readings = [self.readings.pop(layer) for layer in layers]
        try:
            plans = initialize_layers(readings, self.config, self.ranks[layers[0]], self.blocks.model.device)
        except ValueError as error:
            raise UsageError(f"convert, layer {layers[0]}: {error}") from None
        del readings
        give_back_memory()
        if self.config.budget is not None:
            with ExitStack() as stack:
                dense = [stack.enter_context(self.blocks.open(layer)).attn1 for layer in layers]
                plans[0].curve = self._curve(dense, plans, [self.traces.pop(layer) for layer in layers])
        for layer, plan in zip(layers, plans, strict=True):
            self.shelf.put(layer, self.blocks.state(layer), plan)
        self._report("convert", sum(i in self.shelf for i in range(len(self.ranks))), len(self.ranks))

    def _curve(self, dense: list[Any], plans: list[LayerInit], traces: list[list[Trace]]) -> Curve:
        """The error curve of one latent, as a relative rise of the teacher's loss at each candidate rank."""

        def truncated(rank: int) -> list[nn.Module]:
            pairs = zip(dense, plans, strict=True)
            return [latent_attention(layer, plan.truncated(rank), self.config, rank) for layer, plan in pairs]

        loss = self.summed_loss / self.clips
        curve = measured_curve(dense, truncated, self.candidates, traces)
        return [(rank, error / loss) for rank, error in curve]

    def _report(self, phase: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(phase, done, total)
