"""Finds the VAE, text encoder, tokenizer and image encoder of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..export.components import INDEX, REFERENCES
from ..export.manifest import read_manifest
from ..files import MANIFEST
from ..load import read_json
from ..load.hub import download, is_hub_id

TEXT, PICTURES = ("tokenizer", "text_encoder"), ("vae",)


def find_parts(root: Path, wanted: Sequence[str], elsewhere: str | None = None) -> Path | None:
    """The folder with the `wanted` components of the checkpoint in `root`, by their names in a diffusers pipeline.

    If `elsewhere` is given, a folder or Hub ID of a pipeline, only that is searched. Otherwise the search order is:
    beside the transformer, the references in `model_index.json`, the source's components according to the manifest, the
    source itself. Components on the Hub are downloaded. Returns None if there are none. Raises UserError in one line.
    """
    if elsewhere is not None:
        return _in_pipeline(elsewhere, wanted)
    if _has(root, wanted):
        return root
    named = read_json(root / INDEX).get(REFERENCES, {}) if (root / INDEX).is_file() else {}
    if all(name in named for name in wanted):
        return download(named[wanted[0]]["repository"], named[wanted[0]]["revision"], _patterns(wanted))
    source = (read_manifest(root) if (root / MANIFEST).is_file() else {}).get("source") or {}
    if source.get("components"):
        return _in_pipeline(source["components"], wanted)
    return _in_source(source, wanted)


def _in_pipeline(place: str, wanted: Sequence[str]) -> Path:
    """The folder or downloaded repository `place`. Raises UserError if a wanted component is missing there."""
    folder = Path(place).expanduser()
    found = folder if folder.is_dir() else download(place, None, _patterns(wanted))
    missing = [name for name in wanted if not (found / name).is_dir()]
    if missing:
        raise UserError(f"{place} has no {missing[0]}; give the folder or Hub ID of a complete pipeline")
    return found


def _in_source(source: dict[str, Any], wanted: Sequence[str]) -> Path | None:
    """The folder of the source that a checkpoint was converted from, if it still has the components."""
    origin, revision = source.get("model"), source.get("revision")
    if not origin or origin.startswith("zoo:"):
        return None
    if revision and is_hub_id(origin):
        found = download(origin, revision, _patterns(wanted))
        return found if _has(found, wanted) else None
    return parts_here(origin, wanted)


def parts_here(origin: str, wanted: Sequence[str]) -> Path | None:
    """The local folder `origin`, a pipeline or its transformer, or its parent: whichever has the components."""
    path = Path(origin).expanduser()
    return next((folder for folder in (path, path.parent) if _has(folder, wanted)), None)


def _has(folder: Path, wanted: Sequence[str]) -> bool:
    return all((folder / name).is_dir() for name in wanted)


def _patterns(wanted: Sequence[str]) -> list[str]:
    return [INDEX, *(f"{name}/*" for name in wanted)]
