"""Applies gradient checkpointing and per-block compilation to the networks of a stage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..errors import UserError
from .stages.base import StageConfig


@contextlib.contextmanager
def execution(config: StageConfig, trained: Iterable[Any], frozen: Iterable[Any]) -> Iterator[None]:
    """Run the networks as `config` says inside the context, and restore them after it.

    `gradient_checkpointing` stores only the input of a block and recomputes the block in the backward pass.
    `compile` compiles each block separately, in seconds; the whole model would take minutes.
    """
    trained, networks = list(trained), [*trained, *frozen]
    with contextlib.ExitStack() as stack:
        if config.gradient_checkpointing:
            for network in trained:
                stack.enter_context(checkpointed(network))
        if config.compile:
            stack.enter_context(_compiled(networks, config.compile_backend))
        yield


@contextlib.contextmanager
def checkpointed(network: Any) -> Iterator[None]:
    """Recompute the blocks of `network` in backward passes inside the context. Raises UserError if it cannot."""
    already = network.is_gradient_checkpointing
    if not already:
        try:
            network.enable_gradient_checkpointing()
        except ValueError as error:
            raise UserError(f"gradient_checkpointing: {error}") from None
    try:
        yield
    finally:
        if not already:
            network.disable_gradient_checkpointing()


@contextlib.contextmanager
def _compiled(networks: list[Any], backend: str) -> Iterator[None]:
    """Compile the blocks of `networks` inside the context."""
    blocks = [block for network in networks for block in network.blocks]
    # Blocks of one class share a code object, and each may be specialized to its own shapes.
    limit = max(torch._dynamo.config.recompile_limit, 8 * len(blocks))
    with torch._dynamo.config.patch(recompile_limit=limit, accumulated_recompile_limit=16 * limit):
        for block in blocks:
            block.compile(backend=backend)
        try:
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None
