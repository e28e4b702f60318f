"""Sample every layer of a dense model on calibration clips, with one block in memory.

With `metric: output`, the blocks run once, from the first to the last. The probes of a layer measure how an error in
the cache changes the layer's output. With `metric: velocity`, they measure how it changes the model's velocity v: the
gradient of `z^T v` for a random z is pulled back through `leave` and then through every block, from the last to the
first. Each entry of z has variance 1 / n, where n is the size of one clip's velocity. The expected square of a probe's
product with an error in a clip is therefore the MEAN squared error of that clip's velocity that the error causes. Every
clip counts the same, however many are in its batch. Only activations get gradients. Several `probes` are pulled back
together, so that a block runs forward once for all of them.
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


class Visitor:
    """What a sweep shows the layers to; a subclass overrides what it looks at."""

    wants_traces = False
    """Whether to `trace` each layer on one batch in four, at least one, instead of sampling it (`metric: velocity`)."""

    def visit(self, layer: int, block: Any, sample: LayerSample | None) -> nn.Module | None:
        """Look at a layer while its block is open.

        With `hidden_states: converted`, every layer is visited, unwanted ones with sample None. The returned converted
        attention is then what the next blocks run on.
        """
        raise NotImplementedError

    def visited(self, layer: int) -> None:
        """Called for each wanted layer after its block was freed."""

    def passed(self, done: int, total: int) -> None:
        """Called after each block of the forward pass that precedes the visits of `metric: velocity`."""

    def loss(self, loss: float, clips: int) -> None:
        """Take note of the model's mean flow-matching loss on a batch of `clips` (`metric: velocity`)."""

    def trace(self, trace: Trace) -> None:
        """Take note of a layer on a batch, before the layer is visited; an only batch is sampled, too."""


@torch.no_grad()
def sweep(
    blocks: Blocks,
    clips: Clips,
    config: CalibrationConfig,
    history_only: bool,
    wanted: Collection[int],
    visitor: Visitor,
    layers_per_latent: int = 1,
    rotated_only: bool = False,
    queries: bool = False,
) -> None:
    """Sample the `wanted` layers, from the first to the last or back (`metric: velocity`), and show them to `visitor`.

    `history_only` restricts the probes to tokens of earlier chunks, all that is cached under an exact own chunk.
    `rotated_only` leaves out the gradients of keys that are read without their rotation. Layers that share a latent
    are sampled at the same tokens. With `queries`, the inputs of all tokens are sampled, too. The sweep consumes
    `clips`. Raises UserError for NaN or infinite activations, and if the activations that the sweep stores do not fit
    on the disk.
    """
    run = _Sweep(
        blocks, clips, config, history_only, frozenset(wanted), visitor, layers_per_latent, rotated_only, queries
    )
    if config.metric == "velocity":
        run.backward()
    else:
        run.forward()


class _Sweep(NamedTuple):
    blocks: Blocks
    clips: Clips
    config: CalibrationConfig
    history_only: bool
    wanted: frozenset[int]
    visitor: Visitor
    layers_per_latent: int
    rotated_only: bool
    queries: bool

    def forward(self) -> None:
        """Run from the first block to the last wanted one; each layer is sampled with a z of its own."""
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
                attention = self.visitor.visit(layer, block, sample) if sampled or converted else None
                del sample
                if converted:
                    assert attention is not None
                    changed = with_attention(block, attention)
                    for number, inputs in enumerate(clips.inputs):
                        tokens = clips.store[clips.key(layer, number)]
                        clips.advance(layer, number, _run(changed, tokens, inputs, layer).tokens)
                    del attention, changed
            if sampled:
                self.visitor.visited(layer)

    def backward(self) -> None:
        """Run forward through all blocks, storing their inputs, then pull gradients back to the first wanted block.

        If the inputs do not fit in the store, only the input of one block in n is stored, with n as small as possible.
        The backward pass recomputes the other n - 1 from it, bit for bit (Chen et al., arXiv 1604.06174).
        """
        first, count = min(self.wanted, default=len(self.blocks)), len(self.blocks)
        every = self._spacing(count - first)
        self._ascend(range(count), range(first, count, every), self.visitor.passed)
        scales = self._pull_back_velocity()
        for start in reversed(range(first, count, every)):
            segment = range(start, min(start + every, count))
            self._ascend(segment[:-1], segment)
            for layer in reversed(segment):
                self._visit_above(layer, scales)

    def _spacing(self, layers: int) -> int:
        """How many of the upper `layers` there are to one whose input is stored. Raises UserError if none fits."""
        store, size = self.clips.store, self.clips.bytes_a_layer
        # Inputs stored: one per segment, all of the segment being pulled back, and a block's input beside its output.
        # Each probe after the first adds a gradient.
        more = self.config.probes - 1
        needed = {
            every: (math.ceil(layers / every) + every + 1 + more) * size for every in range(1, max(layers, 1) + 1)
        }
        fewer = "lower calibration.clips or calibration.probes" if more else "lower calibration.clips"
        store.require(min(needed.values()), f"{fewer} or set calibration.metric to output")
        every = next(every for every, bytes_needed in needed.items() if store.fits(bytes_needed))
        if every > 1:
            sizes = f"{needed[every] / 1e9:.3g} GB instead of {needed[1] / 1e9:.3g} GB"
            logger.warning("calibration stores the input of one block in %d, %s, and runs blocks twice", every, sizes)
        return every

    def _ascend(
        self, layers: range, kept: Collection[int], passed: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Run the blocks of `layers` in order; their inputs are dropped, except those of `kept`."""
        clips = self.clips
        for layer in layers:
            with self.blocks.open(layer) as block:
                for number, inputs in enumerate(clips.inputs):
                    seen = _run(block, clips.store[clips.key(layer, number)], inputs, layer)
                    clips.advance(layer, number, seen.tokens, keep=layer in kept)
            passed(layer + 1, len(self.blocks))

    def _visit_above(self, layer: int, scales: list[float]) -> None:
        """Pull the gradients back through a block, then visit the layer if it is wanted."""
        with self.blocks.open(layer) as block:
            for number, scale in enumerate(scales):
                self._descend(layer, number, block, scale)
            if layer in self.wanted:
                sample = self._sampled(layer)
                give_back_memory()
                self.visitor.visit(layer, block, sample)
                del sample
        if layer in self.wanted:
            self.visitor.visited(layer)

    def _pull_back_velocity(self) -> list[float]:
        """Replace the last block's output by the gradients of `z^T v` with respect to it; return z's scale by batch.

        Each probe's z is drawn with unit variance and scaled only where it is used, so that half precision can hold it.
        """
        clips, model, scales = self.clips, self.blocks.model, []
        for number, inputs in enumerate(clips.inputs):
            key = clips.key(len(self.blocks), number)
            tokens = clips.store[key].requires_grad_()
            with torch.enable_grad():
                v = model.leave(tokens, inputs)
            self.visitor.loss(clips.loss(number, v.detach()), len(v))
            for probe in range(self.config.probes):
                z = torch.randn(v.shape, generator=drawn(Use.PROJECTION, self.config.seed, number, probe)).to(v)
                (grad,) = torch.autograd.grad(v, tokens, z, retain_graph=probe + 1 < self.config.probes)
                clips.store[clips.key(len(self.blocks), number, probe)] = grad
            scales.append(v[0].numel() ** -0.5)
        return scales

    def _descend(self, layer: int, number: int, block: Any, scale: float) -> None:
        """Pull one batch's gradients from a block's output back to its input, and sample the layer if it is wanted."""
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
        if self.visitor.wants_traces:
            # Errors measured on the fitted batches would be too small, so a quarter of the batches is held out.
            count = len(clips)
            if number % 4 == min(4, count) - 1:
                self.visitor.trace(Trace(hidden, inputs.step, output_grads))
                if count > 1:
                    return
        self._sample(layer, number, block, hidden, output_grads)

    def _sample(
        self, layer: int, number: int, block: Any, hidden: Tensor, output_grads: list[Tensor] | None = None
    ) -> None:
        """Sample a layer on one batch into the store, because samples are large next to the stored tokens."""
        sample = sample_layer(
            block.attn1,
            hidden,
            self.clips.inputs[number].step,
            self.config,
            self.history_only,
            self._tokens(number),
            drawn(Use.SAMPLE, self.config.seed, layer - layer % self.layers_per_latent, number),
            output_grads,
            self.rotated_only,
            queries=self.queries,
        )
        for name in FIELDS:
            self.clips.store[_sample_key(number, name)] = getattr(sample, name)

    def _tokens(self, number: int) -> int:
        """How many tokens of batch `number` are sampled: its clips' share of `max_tokens`, at least one."""
        sizes = [len(target) for target in self.clips.targets]
        return max(1, self.config.max_tokens * sizes[number] // sum(sizes))

    def _sampled(self, layer: int) -> LayerSample:
        """Join the samples of all batches. Raises UserError for NaN or infinite activations."""
        store = self.clips.store
        numbers = [number for number in range(len(self.clips)) if _sample_key(number, FIELDS[0]) in store]
        joined = {name: torch.cat([store.pop(_sample_key(n, name)).cpu() for n in numbers]) for name in FIELDS}
        return require_finite(LayerSample(**joined), layer)


def _sample_key(number: int, name: str) -> str:
    """The store's key for a field of the sample of batch `number`."""
    return f"sample-{number:05d}-{name}"


class _Seen(NamedTuple):
    """The input and output of a block's self-attention, and the block's output; `[B, S, C]` each."""

    hidden: Tensor
    attention: Tensor
    tokens: Tensor


def _run(block: Any, tokens: Tensor, inputs: BlockInputs, layer: int) -> _Seen:
    """Run one block, with gradients for activations only. Raises UserError for NaN or infinite activations."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = block.attn1.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    frozen = {name: parameter.detach() for name, parameter in block.named_parameters()}
    try:
        output = torch.func.functional_call(block, frozen, (tokens, *inputs.shared))
    finally:
        hook.remove()
    hidden, attention = seen.pop()
    if not torch.isfinite(output).all():
        raise UserError(_not_finite(block.attn1, hidden, layer))
    return _Seen(hidden, attention, output)


def _not_finite(attention: Any, hidden: Tensor, layer: int) -> str:
    """Name the first place in a layer where NaN or infinite values occur."""
    named = dict(zip(("query", "key", "value"), attention.project(hidden), strict=True))
    bad = next((name for name, x in {"input": hidden, **named}.items() if not torch.isfinite(x).all()), "output")
    return f"calibration gave NaN or infinite values in the {bad} of layer {layer}; check the weights"
