"""Shared by the tests on a simulated GPU: tiny models, clips, and a check that the GPU's results equal the CPU's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pico
import torch
from pretend_gpu import GPU, pretended
from torch import Tensor

from mla_convert.distill.data import Batch

CPU = torch.device("cpu")
FAR = {"causal": None, "chunk_partition": [1, 2, 2, 2], "compressed_patch_size": (1, 4, 4)}
FEW = {"num_inference_steps": 1}


def same(made: Callable[[torch.device], Any]) -> None:
    """Assert that `made` returns the same tensors or arrays on the simulated GPU and on the CPU."""
    expected = made(CPU)
    with pretended():
        actual = made(GPU)
    # Observed: 1.8e-7 of the largest magnitude for latents and 1.7e-6 for pixels; 1.8e-5 for streams on another CPU.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=5e-5)


@functools.cache
def model(variant: int | None = 0, family: str = "wan", **changes: Any) -> Any:
    """A dense model, or one converted to a layout of `pico.VARIANTS`."""
    dense = pico.dense_model(family=family, **(FAR if family == "anyflow_far" else {}))
    return dense if variant is None else pico.convert(dense, **pico.VARIANTS[variant], **changes)


class Clips:
    """Random clips of six frames; reading clip `stop` ends the run."""

    size = identity = None

    def __init__(self, stop: int | None) -> None:
        self.stop = stop

    @property
    def negative(self) -> Tensor:
        return torch.ones_like(self.example(0)["encoder_hidden_states"])

    def example(self, index: int) -> Batch:
        if index == self.stop:
            raise KeyboardInterrupt
        latents, _, text = pico.inputs(1, 6, 4, 4, seed=index)
        return {"latents": latents[0], "encoder_hidden_states": text[0]}

    def heldout(self, count: int) -> Batch:
        latents, _, text = pico.inputs(count, 6, 4, 4, seed=99)
        return {"latents": latents, "encoder_hidden_states": text}
