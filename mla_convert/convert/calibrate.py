"""Samples of every layer of a dense model, block by block over the hidden states of calibration clips.

With `metric: output` the blocks are run once, from the first to the last, and the probes of a layer ask
how an error in what is cached changes the output of the layer. With `metric: velocity` they ask how it
changes the model's velocity v: the gradient of `z^T v` for a random z is pulled back through `leave` and
through one block after the other, from the last to the first. Each entry of z has variance 1 / n for the
n numbers in the velocity of its batch, so that the expected square of a probe's product with an error is
the MEAN squared error of the velocity that it causes. Only activations get gradients. With several `probes` as
many gradients go down beside each other: a block is run forward once for all of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..draws import Use, drawn
from ..errors import UserError
from ..families.base import BlockInputs
from .blocks import Blocks, give_back_memory, with_attention
from .budget import Trace
from .clips import Clips
from .config import CalibrationConfig
from .probe import FIELDS, LayerSample, require_finite, sample_layer

logger = logging.getLogger(__name__)

Visit = Callable[[int, Any, LayerSample | None], nn.Module | None]


@torch.no_grad()
def sweep(
    blocks: Blocks,
    clips: Clips,
    config: CalibrationConfig,
    history_only: bool,
    wanted: Collection[int],
    visit: Visit,
    progress: Callable[[int, int], None] | None = None,
    velocity: Callable[[int, Tensor], None] | None = None,
    trace: Callable[[Trace], None] | None = None,
    layers_per_latent: int = 1,
    visited: Callable[[int], None] | None = None,
    rotated_only: bool = False,
) -> None:
    """Sample the `wanted` layers, each for `visit(layer, block, sample)` while its block is open.

    `visited(layer)` follows for each of them when its block has been let go.

    With `history_only` the probes ask only about tokens of earlier chunks, which is all that an exact
    own chunk leaves to the cache; with `rotated_only` they leave out keys that are read without their rotation.
    With `hidden_states: converted` every layer is visited, the others
    with no sample, and `visit` gives the converted attention that the blocks above run on. `progress`
    counts the blocks of a forward sweep that comes before the visits. With `metric: velocity` `velocity`
    is told the number and the velocity `[B, C, F, H, W]` of every batch, and `trace` what each layer
    does on one batch in four (at least one), which is then not sampled if there are others. Layers that
    share a latent are sampled at the same tokens.
    What was entered in `clips` is used up. Raises UserError for NaN or infinite activations, and where
    the tokens that a sweep keeps do not fit on the disk.
    """
    chosen = frozenset(wanted)
    told = (visit, velocity, trace, layers_per_latent, visited, rotated_only)
    run = _Sweep(blocks, clips, config, history_only, chosen, *told)
    if config.metric == "velocity":
        run.backward(progress)
    else:
        run.forward()


class _Sweep(NamedTuple):
    blocks: Blocks
    clips: Clips
    config: CalibrationConfig
    history_only: bool
    wanted: frozenset[int]
    visit: Visit
    velocity: Callable[[int, Tensor], None] | None
    trace: Callable[[Trace], None] | None
    layers_per_latent: int
    visited: Callable[[int], None] | None
    rotated_only: bool

    def forward(self) -> None:
        """From the first block to the last wanted one, each layer sampled with z of its own."""
        clips, converted = self.clips, self.config.hidden_states == "converted"
        clips.store.require(2 * clips.bytes_a_layer, "lower calibration.clips")
        for layer in range(max(self.wanted, default=-1) + 1):
            with self.blocks.open(layer) as block:
                sampled = layer in self.wanted
                if sampled or not converted:
                    for number, inputs in enumerate(clips.inputs):
                        seen = _run(block, clips.store[clips.key(layer, number)], inputs, layer)
                        if sampled:
                            self._sample(layer, number, block, seen.hidden)
                        if not converted:
                            clips.advance(layer, number, seen.tokens)
                sample = self._sampled(layer) if sampled else None
                give_back_memory()
                attention = self.visit(layer, block, sample) if sampled or converted else None
                del sample
                if converted:
                    assert attention is not None
                    changed = with_attention(block, attention)
                    for number, inputs in enumerate(clips.inputs):
                        tokens = clips.store[clips.key(layer, number)]
                        clips.advance(layer, number, _run(changed, tokens, inputs, layer).tokens)
                    del attention, changed
            if self.visited is not None and sampled:
                self.visited(layer)

    def backward(self, progress: Callable[[int, int], None] | None) -> None:
        """Up through all blocks, keeping what enters them, then down to the first wanted one.

        Where that is more than the store takes, only one block's in n is kept, n as small as may be, and the way
        down computes what enters the n - 1 above it again, to the same bits (Chen et al., arXiv 1604.06174).
        """
        first, count = min(self.wanted, default=len(self.blocks)), len(self.blocks)
        every = self._spacing(count - first)
        self._ascend(range(count), range(first, count, every), progress)
        scales = self._pull_back_velocity()
        for start in reversed(range(first, count, every)):
            segment = range(start, min(start + every, count))
            self._ascend(segment[:-1], segment)
            for layer in reversed(segment):
                self._visit_above(layer, scales)

    def _spacing(self, layers: int) -> int:
        """Of how many of the upper `layers` one's input is kept. Raises UserError where no number will do."""
        store, size = self.clips.store, self.clips.bytes_a_layer
        # One of each segment, all of the segment on its way down, and what enters a block beside what leaves it.
        # Of probes after the first a gradient lies beside them.
        more = self.config.probes - 1
        kept = {every: (math.ceil(layers / every) + every + 1 + more) * size for every in range(1, max(layers, 1) + 1)}
        fewer = "lower calibration.clips or calibration.probes" if more else "lower calibration.clips"
        store.require(min(kept.values()), f"{fewer} or set calibration.metric to output")
        every = next(every for every, needed in kept.items() if store.fits(needed))
        if every > 1:
            sizes = f"{kept[every] / 1e9:.3g} GB instead of {kept[1] / 1e9:.3g} GB"
            logger.warning("calibration keeps the input of one block in %d, %s, and runs blocks twice", every, sizes)
        return every

    def _ascend(self, layers: range, kept: Collection[int], progress: Callable[[int, int], None] | None = None) -> None:
        """Run the blocks of `layers` one after the other; what enters a block goes, unless it is one of `kept`."""
        clips = self.clips
        for layer in layers:
            with self.blocks.open(layer) as block:
                for number, inputs in enumerate(clips.inputs):
                    seen = _run(block, clips.store[clips.key(layer, number)], inputs, layer)
                    clips.advance(layer, number, seen.tokens, keep=layer in kept)
            if progress is not None:
                progress(layer + 1, len(self.blocks))

    def _visit_above(self, layer: int, scales: list[float]) -> None:
        """Pull the gradient back through a block, and give the layer to `visit` if it is wanted."""
        with self.blocks.open(layer) as block:
            for number, scale in enumerate(scales):
                self._descend(layer, number, block, scale)
            if layer in self.wanted:
                sample = self._sampled(layer)
                give_back_memory()
                self.visit(layer, block, sample)
                del sample
        if self.visited is not None and layer in self.wanted:
            self.visited(layer)

    def _pull_back_velocity(self) -> list[float]:
        """The last block's tokens become the gradients of `z^T v` in them; the scale of z by batch.

        Each probe's z is drawn with unit variance and scaled where it is used, so that half precision holds it.
        """
        clips, model, scales = self.clips, self.blocks.model, []
        for number, inputs in enumerate(clips.inputs):
            key = clips.key(len(self.blocks), number)
            tokens = clips.store[key].requires_grad_()
            with torch.enable_grad():
                v = model.leave(tokens, inputs)
            if self.velocity is not None:
                self.velocity(number, v.detach())
            for probe in range(self.config.probes):
                z = torch.randn(v.shape, generator=drawn(Use.PROJECTION, self.config.seed, number, probe)).to(v)
                (grad,) = torch.autograd.grad(v, tokens, z, retain_graph=probe + 1 < self.config.probes)
                clips.store[clips.key(len(self.blocks), number, probe)] = grad
            scales.append(v.numel() ** -0.5)
        return scales

    def _descend(self, layer: int, number: int, block: Any, scale: float) -> None:
        """Turn the gradients above a block into those below it, and sample the layer if it is wanted."""
        clips, inputs, last = self.clips, self.clips.inputs[number], self.config.probes - 1
        tokens = clips.store[clips.key(layer, number)].requires_grad_()
        with torch.enable_grad():
            seen = _run(block, tokens, inputs, layer)
        output_grads: list[Tensor] = []
        for probe in range(last + 1):
            above = clips.store.pop(clips.key(layer + 1, number, probe))
            wanted = (seen.attention, tokens)
            output_grad, below = torch.autograd.grad(seen.tokens, wanted, above, retain_graph=probe < last)
            del above
            clips.store[clips.key(layer, number, probe)] = below
            if layer in self.wanted:
                output_grads.append(scale * output_grad.float())
        hidden = seen.hidden.detach()
        del seen, wanted, below, output_grad
        give_back_memory()
        if layer not in self.wanted:
            return
        if self.trace is not None:
            # Errors measured on what was fitted are too small: a quarter of the batches is kept from the fit.
            count = len(clips)
            if number % 4 == min(4, count) - 1:
                self.trace(Trace(hidden, inputs.step, output_grads))
                if count > 1:
                    return
        self._sample(layer, number, block, hidden, output_grads)

    def _sample(
        self, layer: int, number: int, block: Any, hidden: Tensor, output_grads: list[Tensor] | None = None
    ) -> None:
        """Sample a layer on one batch. Beside other layers' tokens samples are large and wait in the store."""
        sample = sample_layer(
            block.attn1,
            hidden,
            self.clips.inputs[number].step,
            self.config,
            self.history_only,
            max(1, self.config.max_tokens // len(self.clips)),
            drawn(Use.SAMPLE, self.config.seed, layer - layer % self.layers_per_latent, number),
            output_grads,
            self.rotated_only,
        )
        for name in FIELDS:
            self.clips.store[_part(number, name)] = getattr(sample, name)

    def _sampled(self, layer: int) -> LayerSample:
        """The samples of all batches. Raises UserError for NaN or infinite activations."""
        store = self.clips.store
        numbers = [number for number in range(len(self.clips)) if _part(number, FIELDS[0]) in store]
        joined = {name: torch.cat([store.pop(_part(number, name)).cpu() for number in numbers]) for name in FIELDS}
        return require_finite(LayerSample(**joined), layer)


def _part(number: int, name: str) -> str:
    """Where a field of the sample of batch `number` waits."""
    return f"sample-{number:05d}-{name}"


class _Seen(NamedTuple):
    """Input and output of a block's self-attention and the block's output, `[B, S, C]` each."""

    hidden: Tensor
    attention: Tensor
    tokens: Tensor


def _run(block: Any, tokens: Tensor, inputs: BlockInputs, layer: int) -> _Seen:
    """One block, with gradients for activations only. Raises UserError for NaN or infinite activations."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = block.attn1.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    frozen = {name: parameter.detach() for name, parameter in block.named_parameters()}
    try:
        output = torch.func.functional_call(block, frozen, (tokens, *inputs.shared))
    finally:
        hook.remove()
    hidden, attention = seen.pop()
    if not torch.isfinite(output).all():
        raise UserError(_first_bad(block.attn1, hidden, layer))
    return _Seen(hidden, attention, output)


def _first_bad(attention: Any, hidden: Tensor, layer: int) -> str:
    named = dict(zip(("query", "key", "value"), attention.project(hidden), strict=True))
    bad = next((name for name, x in {"input": hidden, **named}.items() if not torch.isfinite(x).all()), "output")
    return f"calibration gave NaN or infinite values in the {bad} of layer {layer}; check the weights"
