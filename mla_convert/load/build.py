"""Builds a model from a configuration and tensors, which are checked before any data is read."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import no_init_weights
from pydantic import ValidationError

from ..errors import UserError
from .tensors import LazyTensors

logger = logging.getLogger(__name__)

# Number of offending tensors that an error names.
_NAMED = 3


def accepted_config(model_class: type[Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `config` that `model_class` takes; a warning names the other keys, except private ones."""
    parameters = inspect.signature(model_class.__init__).parameters
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    ignored = sorted(key for key, value in public.items() if key not in parameters and value is not None)
    if ignored:
        logger.warning("%s ignores the unknown configuration keys %s", model_class.__name__, ", ".join(ignored))
    return {key: value for key, value in public.items() if key in parameters}


def check_tensors(model_class: type[Any], config: Mapping[str, Any], tensors: LazyTensors, where: str) -> LazyTensors:
    """The tensors that `model_class` needs, with names, shapes and dtypes checked from the headers.

    Raises UserError with `where`, the first offending tensors and the number of others.
    """
    expected = expected_shapes(model_class, config, where)
    ignored = model_class._keys_to_ignore_on_load_unexpected or []
    names = [name for name in tensors if name in expected or not any(re.search(p, name) for p in ignored)]
    # Check dtypes first, because quantized weights also come with additional tensors.
    for name in names:
        if name in expected:
            tensors.dtype(name)
    missing = [name for name in expected if name not in tensors]
    unexpected = [tensors.stored_name(name) for name in names if name not in expected]
    problems = [f"lacks {_first(missing)}"] if missing else []
    if unexpected:
        problems.append(f"has the unknown {_first(unexpected)}")
    if problems:
        raise UserError(f"{where} {' and '.join(problems)}; it does not fit its configuration")
    for name in names:
        if tensors.shape(name) != expected[name]:
            others = sum(tensors.shape(other) != expected[other] for other in names) - 1
            raise UserError(
                f"{where}: tensor {tensors.stored_name(name)} has shape {list(tensors.shape(name))}, but its "
                f"configuration expects {list(expected[name])}" + (f" (and {others} more)" if others else "")
            )
    return tensors.select({name: name for name in names})


def _first(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(names[:_NAMED])}{more}"


def expected_shapes(model_class: type[Any], config: Mapping[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's state dict, from a model on the meta device. Raises UserError."""
    try:
        with torch.device("meta"):
            model = model_class.from_config(dict(config))
    except (ValueError, TypeError, KeyError, AssertionError, ArithmeticError, RuntimeError) as error:
        reason = _one_line(error)
        raise UserError(f"{where}: its configuration does not describe a {model_class.__name__}: {reason}") from None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
    return " ".join(str(error).split()) or type(error).__name__


def build_model(
    model_class: type[Any],
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """A model in eval mode that owns its weights; building it takes the memory of one more tensor at a time.

    With `dtype` None, the dtypes of `tensors` are kept. Otherwise modules that the class keeps in float32 stay in
    float32, as in `from_pretrained`. Raises UserError for a tensor with NaN or infinite values.
    """
    with no_init_weights(), init_empty_weights():
        model = model_class.from_config(dict(config))
    state = {}
    for name in model.state_dict():
        target = storage_dtype(model_class, name, dtype)
        # Copy, so that the file can be closed, and because its tensors may be unaligned.
        state[name] = tensors[name].to(device=device, dtype=target, copy=True)
    model.load_state_dict(state, assign=True)
    return model.to(device).eval()


def storage_dtype(model_class: type[Any], name: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype of a tensor in a model of `dtype`; None if the stored dtype is kept."""
    kept = set(model_class._keep_in_fp32_modules or ())
    return torch.float32 if dtype is not None and kept & set(name.split(".")) else dtype
