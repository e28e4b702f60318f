"""Load a recipe file, apply `--set` overrides and validate the result; compare dumped recipes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RecipeError, UsageError, quoted
from ..files import unreadable
from .reader import read_yaml

if TYPE_CHECKING:
    from .schema import Recipe


def load_recipe(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Load the recipe in a YAML file, with `key.path=value` overrides applied.

    Raises UsageError in one line, RecipeError if keys are wrong.
    """
    text = read_recipe(path)
    try:
        return parse_recipe(text, overrides)
    except RecipeError as error:
        raise RecipeError(*(f"{path}: {line}" for line in error.lines)) from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def read_recipe(path: Path) -> str:
    """The text of a recipe file. Raises UsageError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read recipe {path}: {unreadable(error)}") from None


def parse_recipe(text: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Parse the recipe in a YAML text, with overrides applied. Raises UsageError as `load_recipe` does."""
    value = read_yaml(text)
    if not isinstance(value, dict):
        raise UsageError("this is not a recipe (a mapping of sections); start from one with mla-convert recipes copy")
    for override in overrides:
        apply_override(value, override)
    # The classes of sections and stages import PyTorch; what is wrong so far is said without that.
    from .schema import validate_recipe

    return validate_recipe(value)


def apply_override(recipe: dict[str, Any], override: str) -> None:
    """Apply an override such as `a.b.0.c=value` to a parsed recipe, in place; the value is YAML. Raises UsageError."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UsageError(f"--set {quoted(override)} is not of the form key.path=value")
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
            raise UsageError(f"--set {path}: {where} is not a section and has no key {key!r}")


def first_difference(old: Any, new: Any) -> tuple[str, Any, Any] | None:
    """The first of the `differences` of two dumped recipes, or None."""
    return next(differences(old, new), None)


def has_key(recipe: Any, path: str) -> bool:
    """Whether a dumped recipe has the dotted key `path`, even if its value is null."""
    for key in path.split("."):
        entries = {str(index): entry for index, entry in enumerate(recipe)} if isinstance(recipe, list) else recipe
        if not isinstance(entries, dict) or key not in entries:
            return False
        recipe = entries[key]
    return True


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted keys at which two dumped recipes differ, with the old and the new value."""
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
