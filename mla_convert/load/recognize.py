"""Recognizes the family of a model from its configuration or tensors, or says why it cannot be converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import registry
from ..errors import UserError
from ..families.base import Family
from .tensors import LazyTensors
from .weights import CONFIG, read_config


def recognize(config: dict[str, Any], path: Path) -> Family:
    """The family that the configuration at `path` belongs to.

    Raises UserError with the reason and what is supported.
    """
    name = str(config.get("_class_name", "not given"))
    for family in _families():
        if name in (*family.source_classes, *family.foreign_classes):
            # Refuse a bad configuration in another layout before any weights are downloaded.
            in_our_layout(family, config, None, path)
            return family
        if name == family.mla_class.__name__:
            raise UserError(f"{path}: the model is already converted ({name}); start from the dense model")
    reasons = [f"{name}: {family.near_misses[name]}" for family in _families() if name in family.near_misses]
    raise _refusal(str(path), reasons[0] if reasons else f"its class is {name}")


def known_config(folder: Path) -> dict[str, Any]:
    """The config.json of a transformer's `folder`, with the keys of another repository translated to our classes'.

    Raises UserError.
    """
    stored = read_config(folder)
    for family in _families():
        if stored.get("_class_name") in family.source_classes:
            return in_our_layout(family, stored, None, folder / CONFIG)
    return stored


def in_our_layout(family: Family, config: dict[str, Any], tensors: LazyTensors | None, path: Path) -> dict[str, Any]:
    """The configuration in the keys of the family's stock class. Raises UserError."""
    try:
        translated = family.stock_config(config, tensors.shapes() if tensors else {})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config if translated is None else translated


def in_our_names(family: Family, tensors: LazyTensors, where: str) -> LazyTensors:
    """`tensors` under the names of the family's dense class.

    Raises UserError for a related model that only its tensors identify, and for one tensor under two names.
    """
    for part, reason in family.near_miss_tensors.items():
        telltale = next((name for name in tensors if part in name.split(".")), None)
        if telltale is not None:
            raise _refusal(where, f"tensor {telltale}: {reason}")
    renamed = family.stored_names(tensors)
    if renamed is None:
        return tensors
    if len(renamed) < len(tensors):
        double = next(name for name in tensors if name not in renamed.values())
        raise UserError(f"{where} holds the tensor {double} under two names; remove one")
    return tensors.select(renamed)


def infer(tensors: LazyTensors, where: str) -> tuple[Family, dict[str, Any], LazyTensors]:
    """Family, configuration and named tensors of a file without a configuration. Raises UserError."""
    for family in _families():
        named = in_our_names(family, tensors, where)
        try:
            config = family.infer_config(named.shapes())
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if config is not None:
            return family, config, named
    held = ", ".join(list(tensors)[:3]) or "none"
    reason = f"its tensors ({held}, ...) are of no supported model"
    raise UserError(f"{_refusal(where, reason)}; put its {CONFIG} beside the file")


def _families() -> list[Family]:
    return list(registry.families().values())


def _refusal(where: str, reason: str) -> UserError:
    supported = ", ".join(name for family in _families() for name in (*family.source_classes, *family.foreign_classes))
    return UserError(f"{where}: this model cannot be converted ({reason}); supported are {supported}")
