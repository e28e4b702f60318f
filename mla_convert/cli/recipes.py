"""`mla-convert recipes`: lists, shows, copies and checks recipes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..errors import RecipeError, UserError
from ..files import write_text
from ..recipe.shipped import describe_recipe, find_recipe, shipped_recipes
from .options import Json, Overrides, RecipeName
from .output import print_error, print_result, stderr

app = typer.Typer(help="List, show, copy and check recipes.", no_args_is_help=True)


@app.command("list")
def list_recipes(as_json: Json = False) -> None:
    """List the recipes that ship with mla-convert."""
    descriptions = {name: describe_recipe(path) for name, path in shipped_recipes().items()}
    table = Table("recipe", "what it is for", box=None, pad_edge=False)
    for name, description in descriptions.items():
        table.add_row(name, description)
    print_result(as_json, {"recipes": [{"name": n, "description": d} for n, d in descriptions.items()]}, table)


@app.command("show")
def show(recipe: RecipeName, as_json: Json = False) -> None:
    """Print a recipe file."""
    from ..recipe.load import read_recipe

    path = find_recipe(recipe)
    text = read_recipe(path)
    if as_json:
        print_result(True, {"name": path.stem, "path": str(path), "text": text})
    else:
        sys.stdout.write(text)


@app.command("copy")
def copy(
    recipe: RecipeName,
    target: Annotated[Path | None, typer.Argument(help="A file or folder; the current folder by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Copy a recipe as a starting point for your own."""
    from ..recipe.load import read_recipe

    path = find_recipe(recipe)
    target = target or Path()
    if target.is_dir():
        target /= path.name
    if target.exists() and not force:
        raise UserError(f"{target} exists; give another name, or --force to replace it")
    write_text(target, read_recipe(path))
    print_result(as_json, {"path": str(target)}, f"wrote {target}")


@app.command("check")
def check(
    recipe: RecipeName,
    overrides: Overrides = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="Print the recipe with every default.")] = False,
    as_json: Json = False,
) -> None:
    """Check a recipe and its data without running it, and that they fit its source if that is on this machine.

    All mistakes in its keys are printed, one a line.
    """
    from ..recipe.load import load_recipe

    path = find_recipe(recipe)
    with stderr().status("loading PyTorch"):
        try:
            loaded = load_recipe(path, overrides or ())
        except RecipeError as error:
            for line in error.lines:
                print_error(line)
            raise typer.Exit(error.exit_code) from None
        # The models are only needed for a recipe whose keys are right.
        from ..pipeline.checks import check_recipe
    checked = check_recipe(loaded)
    value = {
        "valid": True,
        "source_checked": checked.source,
        "unchecked": checked.unchecked,
        "latent_size": checked.size,
        "path": str(path),
        "recipe": loaded.model_dump(mode="json"),
    }
    rest = [f"\n{line}" for line in checked.unchecked]
    if resolved and not as_json:
        sys.stdout.write(loaded.dump())
    else:
        size = "" if checked.size is None else f"; its samples are latents of {checked.size[0]}x{checked.size[1]}"
        print_result(as_json, value, "".join([f"{path}: a valid recipe, {loaded.name!r}{size}", *rest]))


@app.command("reference")
def reference(as_json: Json = False) -> None:
    """Print every key of a recipe, with its type and default, as Markdown."""
    from ..recipe.reference import reference as write_reference

    text = write_reference()
    if as_json:
        print_result(True, {"markdown": text})
    else:
        sys.stdout.write(text)
