"""The documentation builds, every page is in it, and the reference of recipe keys is that of the schema."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mla_convert.recipe.reference import reference

ROOT = Path(__file__).parents[1]


def test_recipe_reference_is_up_to_date() -> None:
    committed = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert committed == reference(), "docs/recipes.md is old; `make docs` writes it"


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {page.relative_to(ROOT / "docs").with_suffix("") for page in (ROOT / "docs").rglob("*.md")}
    built = {page.parent.relative_to(tmp_path / "site") for page in (tmp_path / "site").rglob("index.html")}
    left_out = {page for page in pages if page.name not in ("index", "README")} - built
    assert left_out == set()
