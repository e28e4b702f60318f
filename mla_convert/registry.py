"""Find model families and distillation stages in this package, and in other packages by entry points."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any

FAMILIES, STAGES = "mla_convert.families", "mla_convert.stages"


@functools.cache
def collect(package: str, constant: str, group: str | None = None) -> Mapping[str, Any]:
    """Collect the module-level `constant` of every module of `package`, by its attribute `name`, sorted by name.

    With `group`, the objects that installed packages register under that entry point group are added. Modules of
    `package` without the constant are helpers. An error in any module propagates. Raises ValueError if a name is used
    twice or the object of an entry point has no name.
    """
    found: dict[str, tuple[str, Any]] = {}
    for place, item in (*own(package, constant), *_installed(group)):
        if item.name in found:
            raise ValueError(f"{found[item.name][0]} and {place} both export a {constant} called {item.name!r}")
        found[item.name] = (place, item)
    return MappingProxyType({name: found[name][1] for name in sorted(found)})


def families() -> Mapping[str, Any]:
    """The supported model families, `mla_convert.families.base.Family`, by name.

    Raises ValueError if two of them read the same class.
    """
    found = collect(f"{__package__}.families", "FAMILY", FAMILIES)
    owners: dict[str, str] = {}
    for family in found.values():
        for name in (*family.source_classes, *family.foreign_classes):
            owner = owners.setdefault(name, family.name)
            if owner != family.name:
                raise ValueError(f"the families {owner} and {family.name} both read {name}")
    return found


def stages() -> Mapping[str, Any]:
    """The distillation stages, subclasses of `mla_convert.distill.stages.base.Stage`, by name."""
    return collect(f"{__package__}.distill.stages", "STAGE", STAGES)


def stage_of(config: Any) -> Any:
    """The `Stage` of a `StageConfig`."""
    return stages()[config.stage](config)


def own(package: str, constant: str) -> list[tuple[str, Any]]:
    """(module name, value) for every module of `package` that defines `constant`."""
    names = [info.name for info in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}.")]
    items = [(name, vars(importlib.import_module(name)).get(constant)) for name in names]
    return [(name, item) for name, item in items if item is not None]


def _installed(group: str | None) -> Iterator[tuple[str, Any]]:
    for entry in () if group is None else entry_points(group=group):
        item = entry.load()
        if not isinstance(getattr(item, "name", None), str):
            raise ValueError(f"the entry point {entry.value} of {group} has no name: it is {item!r}")
        yield entry.value, item
