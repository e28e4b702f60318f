"""Which of the states in a training checkpoint is the model, and its names without what trainers wrap around.

What the research repositories publish: `generator` and `critic`, `generator_ema` beside or instead of
them (Self-Forcing, Causal-Forcing), `generator` alone (CausVid, LongLive), `generator_lora`
(LongLive), `model`, or the bare state; the names in it begin with `model.` and carry the traces of
FSDP, activation checkpointing and torch.compile.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from ..errors import UserError

EMA, LORA = "generator_ema", "generator_lora"
STATES = ("generator", "model", "state_dict")
WRAPPERS = {
    "model",
    "module",
    "state_dict",
    "diffusion_model",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_orig_mod",
}


class State(NamedTuple):
    """A model's state: its key at the top of the file, if any, and stored names by names without wrappers."""

    key: str | None
    names: dict[str, str]


def find_state(names: Collection[str], use_ema: bool | None, where: str) -> State:
    """The model's state among the flattened names of a file.

    `use_ema` None takes the averaged weights where there are some, as the commands in the README
    files of Self-Forcing and of Causal-Forcing by frames do. Raises UserError if the file lacks what `use_ema` asks
    for, or holds LoRA weights.
    """
    tops = list(dict.fromkeys(name.partition(".")[0] for name in names))
    adapter = next((name for name in names if name.startswith(f"{LORA}.")), None)
    key = _choose(tops, use_ema, where)
    chosen = [name for name in names if key is None or name.startswith(f"{key}.")]
    adapter = adapter or next((name for name in chosen if "lora_" in name), None)
    if adapter is not None:
        raise UserError(
            f"{where} holds LoRA weights ({adapter}), which is half of a model; name the base model as the source and "
            "this file under source.adapters"
        )
    stripped: dict[str, str] = {}
    for name in chosen:
        bare = ".".join(part for part in name.removeprefix(f"{key}.").split(".") if part not in WRAPPERS)
        if bare in stripped:
            raise UserError(f"{where} holds the tensor {bare} twice, as {stripped[bare]} and as {name}")
        stripped[bare] = name
    return State(key, stripped)


def _choose(tops: list[str], use_ema: bool | None, where: str) -> str | None:
    state = next((key for key in STATES if key in tops), None)
    if EMA not in tops:
        if use_ema:
            held = f"only {', '.join(tops[:3])}" if state else "only one set of weights"
            raise UserError(f"{where} holds no averaged weights ({EMA}), {held}; leave source.use_ema out")
        return state
    if use_ema is False:
        if state is None:
            raise UserError(f"{where} holds only averaged weights ({EMA}); leave source.use_ema out")
        return state
    return EMA
