"""From a recipe file and `--set` overrides to a validated Recipe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import unreadable
from .reader import read_yaml
from .schema import Recipe, validate


def load_recipe(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The recipe in a YAML file, after `key.path=value` overrides. Raises UsageError in one line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read recipe {path}: {unreadable(error)}") from None
    try:
        return parse_recipe(text, overrides)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def parse_recipe(text: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The recipe in a YAML text, after overrides."""
    value = read_yaml(text)
    if not isinstance(value, dict):
        raise UsageError("a recipe is a mapping of sections; this file is not")
    for override in overrides:
        apply_override(value, override)
    return validate(Recipe, value)


def apply_override(recipe: dict[str, Any], override: str) -> None:
    """Set `a.b.0.c=value` in a recipe that was read; the value is YAML. Raises UsageError."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UsageError(f"--set {override!r} is not of the form key.path=value")
    try:
        value = read_yaml(text)
    except UsageError as error:
        raise UsageError(f"--set {path}: {error}") from None
    target: Any = recipe
    for depth, key in enumerate(keys):
        where = ".".join(keys[:depth])
        last = depth == len(keys) - 1
        if isinstance(target, list):
            if not key.isdecimal() or int(key) >= len(target):
                raise UsageError(f"--set {path}: {where} has entries 0 to {len(target) - 1}, not {key!r}")
            if last:
                target[int(key)] = value
            else:
                target = target[int(key)]
        elif isinstance(target, dict):
            if last:
                target[key] = value
            else:
                if target.get(key) is None:
                    target[key] = {}
                target = target[key]
        else:
            raise UsageError(f"--set {path}: {where} is not a section, it has no key {key!r}")


def first_difference(old: Any, new: Any) -> tuple[str, Any, Any] | None:
    """The first of the `differences` of two dumped recipes."""
    return next(differences(old, new), None)


def has_key(recipe: Any, path: str) -> bool:
    """Whether a dumped recipe has the dotted key `path`, be it null."""
    for key in path.split("."):
        entries = {str(index): entry for index, entry in enumerate(recipe)} if isinstance(recipe, list) else recipe
        if not isinstance(entries, dict) or key not in entries:
            return False
        recipe = entries[key]
    return True


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The dotted keys at which two dumped recipes differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        entries = [(str(key), old.get(key), new.get(key)) for key in {**old, **new}]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        entries = [(str(index), a, b) for index, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        if old != new:
            yield path, old, new
        return
    for key, a, b in entries:
        yield from differences(a, b, f"{path}.{key}" if path else key)
