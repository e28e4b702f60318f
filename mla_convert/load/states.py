"""Finds the model's state in a training checkpoint, and removes trainer wrappers from its names.

Research repositories publish `generator` and `critic`, with `generator_ema` in addition or instead (Self-Forcing,
Causal-Forcing), only `generator` (CausVid, LongLive), `generator_lora` (LongLive), `model`, or the bare state. Names in
it begin with `model.` and include prefixes of FSDP, activation checkpointing and torch.compile.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import NamedTuple

from ..errors import UserError

EMA, LORA = "generator_ema", "generator_lora"
STATES = ("generator", "model", "state_dict")
OUTSIDE = ("model", "module", "state_dict", "diffusion_model")
"""Names that trainers put before a model's own; within it, a module may have one of these names."""
INSIDE = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
"""Names of wrappers of any module: FSDP, activation checkpointing and torch.compile."""


class State(NamedTuple):
    """A model's state: its top-level key in the file, if any, and a map from names without wrappers to stored names."""

    key: str | None
    names: dict[str, str]


def find_state(names: Collection[str], use_ema: bool | None, where: str) -> State:
    """The model's state among the flattened names of a file.

    With `use_ema` None, averaged weights are used if there are any, as by the commands in the READMEs of Self-Forcing
    and of framewise Causal-Forcing. Raises UserError if the file lacks the weights that `use_ema` requests, or holds
    LoRA weights.
    """
    tops = list(dict.fromkeys(name.partition(".")[0] for name in names))
    adapter = next((name for name in names if name.startswith(f"{LORA}.")), None)
    key = _choose(tops, use_ema, where)
    chosen = [name for name in names if key is None or name.startswith(f"{key}.")]
    adapter = adapter or next((name for name in chosen if "lora_" in name), None)
    if adapter is not None:
        raise UserError(
            f"{where} holds LoRA weights ({adapter}), which are half of a model; name the base model as the source and "
            "this file under source.adapters"
        )
    stripped: dict[str, str] = {}
    for name in chosen:
        bare = unwrapped(name.removeprefix(f"{key}."))
        if bare in stripped:
            raise UserError(f"{where} holds the tensor {bare} twice, as {stripped[bare]} and as {name}; remove one")
        stripped[bare] = name
    return State(key, stripped)


def unwrapped(name: str, outside: Collection[str] = OUTSIDE) -> str:
    """A dotted name without wrappers: without leading names of `outside`, and without those of INSIDE anywhere."""
    parts = [part for part in name.split(".") if part not in INSIDE]
    return ".".join(itertools.dropwhile(lambda part: part in outside, parts))


def _choose(tops: list[str], use_ema: bool | None, where: str) -> str | None:
    state = next((key for key in STATES if key in tops), None)
    if EMA not in tops:
        if use_ema:
            held = f"only {', '.join(tops[:3])}" if state else "only one set of weights"
            raise UserError(f"{where} holds no averaged weights ({EMA}), but {held}; leave source.use_ema out")
        return state
    if use_ema is False:
        if state is None:
            raise UserError(f"{where} holds only averaged weights ({EMA}); leave source.use_ema out")
        return state
    return EMA
