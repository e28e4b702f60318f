"""Pairs a student's self-attention layers with its teacher's, on the teacher's inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..devices import bring_weights
from ..families.causal import CausalTransformer
from ..mla.attention import AttentionPass
from ..mla.latent import reading_together

Compare = Callable[[int, Tensor, AttentionPass, Tensor, AttentionPass], None]


class Beside:
    """Calls `compare(layer, hidden_states, step, out, student_step)` for every layer while the teacher runs.

    `hidden_states` and `out` `[B, S, C]` are the input and output of the teacher's self-attention in the pass `step`
    over a clip. `student_step` lets the student's layer run on the same `hidden_states`: layers that share a latent
    read the one that all of them encode from the teacher's inputs. `close` removes the hooks.
    """

    def __init__(self, student: CausalTransformer, teacher: CausalTransformer, compare: Compare) -> None:
        self.student, self.compare = student, compare
        self.groups = {layer: layers for layers in student.latent_groups for layer in layers}
        self.seen: dict[int, tuple[Tensor, AttentionPass, Tensor]] = {}
        self.hooks = [
            block.attn1.register_forward_hook(self._record(layer)) for layer, block in enumerate(teacher.blocks)
        ]

    def _record(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, None, None, AttentionPass], out: Tensor) -> None:
            self.seen[layer] = (args[0], args[3], out)
            layers = self.groups[layer]
            if layer == layers[-1]:
                self._compare(layers)

        return hook

    def _compare(self, layers: range) -> None:
        calls = [self.seen.pop(layer) for layer in layers]
        for layer in layers:
            # Its attention alone is called here, but weights travel with the whole block.
            bring_weights(self.student.blocks[layer])
        attentions = [self.student.blocks[layer].attn1 for layer in layers]
        dtype = next(attentions[0].parameters()).dtype
        with torch.no_grad():
            student_step = reading_together(attentions, [hidden.to(dtype) for hidden, _, _ in calls], calls[0][1])
        for layer, (hidden_states, step, out) in zip(layers, calls, strict=True):
            self.compare(layer, hidden_states, step, out, student_step)

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
