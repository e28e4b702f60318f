"""Find the recipes that ship with the package: inside the package in a wheel, at the root in a checkout."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError, nearest

_PACKAGE = Path(__file__).parent.parent


def shipped_recipes() -> dict[str, Path]:
    """Recipe files by name, in alphabetical order; benchmark recipes are called `bench/NAME`."""
    for folder in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes"):
        if folder.is_dir():
            files = sorted([*folder.glob("*.yaml"), *folder.glob("bench/*.yaml")])
            return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}
    return {}


def find_recipe(name: str) -> Path:
    """The recipe file at a path, or the shipped recipe of this name. Raises UsageError if there is neither."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    raise UsageError(f"no recipe file or shipped recipe is called {name!r}; {nearest(name, list(shipped))}")


def describe_recipe(path: Path) -> str:
    """The comment on the first line of a recipe, or an empty string."""
    with path.open(encoding="utf-8") as handle:
        first = handle.readline()
    return first.lstrip("# ").strip() if first.startswith("#") else ""
