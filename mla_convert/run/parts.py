"""The VAE, text encoder, tokenizer and image encoder of a checkpoint: beside it, where it names them, or elsewhere."""

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

TEXT, PICTURES, IMAGE_TOKENS = ("tokenizer", "text_encoder"), ("vae",), ("image_processor", "image_encoder")


def find_parts(root: Path, wanted: Sequence[str], elsewhere: str | None = None) -> Path | None:
    """The folder that has the `wanted` parts of the checkpoint in `root`, by their names in a diffusers pipeline.

    They are looked for in `elsewhere`, a folder or Hub id of a pipeline; without it beside the
    transformer, then where `model_index.json` names them, then where the manifest says that the source has
    them, then in the source itself.
    Those on the Hub are downloaded. None if the checkpoint knows of none. Raises UserError in one line.
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
    """The parts in a folder or Hub repository that is said to have them. Raises UserError."""
    folder = Path(place).expanduser()
    found = folder if folder.is_dir() else download(place, None, _patterns(wanted))
    missing = [name for name in wanted if not (found / name).is_dir()]
    if missing:
        raise UserError(f"{place} has no {missing[0]}; give the folder or Hub id of a whole pipeline")
    return found


def _in_source(source: dict[str, Any], wanted: Sequence[str]) -> Path | None:
    """The parts in what a checkpoint was made from, if that is a pipeline and still there."""
    origin, revision = source.get("model"), source.get("revision")
    if not origin or origin.startswith("zoo:"):
        return None
    if revision and is_hub_id(origin):
        found = download(origin, revision, _patterns(wanted))
        return found if _has(found, wanted) else None
    return parts_here(origin, wanted)


def parts_here(origin: str, wanted: Sequence[str]) -> Path | None:
    """The folder `origin`, a pipeline or its transformer, or the one that it lies in, if that has the parts."""
    here = Path(origin).expanduser()
    return next((folder for folder in (here, here.parent) if _has(folder, wanted)), None)


def _has(folder: Path, wanted: Sequence[str]) -> bool:
    return all((folder / name).is_dir() for name in wanted)


def _patterns(wanted: Sequence[str]) -> list[str]:
    return [INDEX, *(f"{name}/*" for name in wanted)]
