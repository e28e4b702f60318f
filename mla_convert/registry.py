"""Find what a folder of modules exports under one agreed name: families, distillation stages."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


@functools.cache
def collect(package: str, constant: str) -> Mapping[str, Any]:
    """Every module-level `constant` in the modules of `package`, by its `name`, in the order of the names.

    Modules without the constant are helpers. An error in any module propagates. Raises ValueError
    when two modules use the same name.
    """
    found: dict[str, tuple[str, Any]] = {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        item = vars(importlib.import_module(info.name)).get(constant)
        if item is None:
            continue
        if item.name in found:
            raise ValueError(f"{found[item.name][0]} and {info.name} both export a {constant} called {item.name!r}")
        found[item.name] = (info.name, item)
    return MappingProxyType({name: found[name][1] for name in sorted(found)})


def families() -> Mapping[str, Any]:
    """The supported model families, `mla_convert.families.base.Family` by name."""
    return collect(f"{__package__}.families", "FAMILY")


def stages() -> Mapping[str, Any]:
    """The distillation stages by name."""
    return collect(f"{__package__}.distill.stages", "STAGE")
