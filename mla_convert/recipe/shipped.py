"""Recipes that ship with the package: in the wheel beside the modules, in a checkout at its root."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError, nearest

_PACKAGE = Path(__file__).parent.parent


def shipped_recipes() -> dict[str, Path]:
    """Files by recipe name, in alphabetical order; those that measure are called `bench/NAME`."""
    for folder in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes"):
        if folder.is_dir():
            files = sorted([*folder.glob("*.yaml"), *folder.glob("bench/*.yaml")])
            return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}
    return {}


def find_recipe(name: str) -> Path:
    """A recipe file given as a path or by the name of a shipped one. Raises UsageError."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    raise UsageError(f"no recipe file or shipped recipe is called {name!r}; {nearest(name, list(shipped))}")


def describe_recipe(path: Path) -> str:
    """The comment in the first line of a recipe."""
    with path.open(encoding="utf-8") as handle:
        first = handle.readline()
    return first.lstrip("# ").strip() if first.startswith("#") else ""
