"""Writes `model_index.json`, which makes a checkpoint a diffusers pipeline with the source's other components.

A component that is only referenced is null for diffusers. `_components` gives its repository, commit, subfolder,
library and class, and `StreamingMLAPipeline` loads it from there.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers

from ..errors import UserError
from ..load import read_json
from ..load.hub import download, is_hub_id
from ..sampling import SamplingConfig
from .checkpoint import TRANSFORMER

logger = logging.getLogger(__name__)

INDEX, REFERENCES = "model_index.json", "_components"
# Keys of model_index.json for how prompts are read, how the model is sampled and how it is executed.
SAMPLING = ("prompt_format", "sampling", "streaming")
# Keys of a recipe's `generate` section that belong to the model, not to a single video.
TRAINED_FOR = (
    *SamplingConfig.model_fields,
    "negative_prompt",
    "recache",
    "hold_start",
    "latent_height",
    "latent_width",
    "fps",
)
PIPELINE, AUTO_CLASS = "StreamingMLAPipeline", "AutoModel"
PARTS = ("scheduler", "tokenizer", "text_encoder", "vae", "image_processor", "image_encoder")
# Only for models that read the CLIP tokens of an image, such as Wan2.1's image-to-video models.
IMAGE_PARTS = ("image_processor", "image_encoder")


@dataclass(frozen=True)
class Components:
    """Library and class of a source's components by name; `folder`, or `repository` at `revision`, has their files."""

    classes: Mapping[str, tuple[str, str]]
    folder: Path | None = None
    repository: str | None = None
    revision: str | None = None


def find_components(
    source: Mapping[str, Any] | None, wanted: Literal["reference", "copy", "none"], reads_images: bool = False
) -> Components:
    """The other components of a checkpoint's source; `source` is that of its manifest.

    `reads_images` includes those that encode an image. Components are only referenced if they are on the Hub,
    where others can find them. A source that is not a pipeline has none, unless it names its `components`.

    Raises UserError for components that should be copied and cannot be read.
    """
    source = source or {}
    names = [name for name in PARTS if reads_images or name not in IMAGE_PARTS]
    named = source.get("components")
    origin = named or source.get("model")
    if wanted == "none" or not origin or origin.startswith("zoo:"):
        return Components({})
    local = Path(origin).expanduser()
    revision = None if named else source.get("revision")
    if is_hub_id(origin) and (revision or (named and not local.is_dir())):
        return _on_hub(origin, revision, wanted == "copy", names)
    root = next((folder for folder in (local, local.parent) if (folder / INDEX).is_file()), None)
    if root is None or wanted == "reference":
        if wanted == "copy" and not local.exists():
            raise UserError(f"cannot copy components from {local}: it does not exist; change export.components")
        return Components({})
    classes = _classes(root, names)
    for name in classes:
        if not (root / name).is_dir():
            raise UserError(f"{root / INDEX} lists {name}, but {root / name} does not exist; restore it")
    return Components(classes, folder=root)


def _on_hub(repository: str, revision: str | None, copy: bool, names: Sequence[str]) -> Components:
    try:
        folder = download(repository, revision, [INDEX])
        # A snapshot folder is named by its commit.
        revision = revision or folder.name
        classes = _classes(folder, names) if (folder / INDEX).is_file() else {}
    except UserError as error:
        if copy:
            raise
        logger.warning("the components of %s are not referenced: %s", repository, error)
        return Components({})
    if copy and classes:
        folder = download(repository, revision, [f"{name}/*" for name in classes])
        return Components(classes, folder=folder)
    return Components(classes, repository=repository, revision=revision)


def _classes(root: Path, names: Sequence[str]) -> dict[str, tuple[str, str]]:
    index = read_json(root / INDEX)
    found = {}
    for name in names:
        match index.get(name):
            case [str(library), str(class_name)]:
                found[name] = (library, class_name)
    return found


def sampling_of(recipe: Mapping[str, Any] | None) -> dict[str, Any]:
    """The keys `SAMPLING` that a resolved recipe sets for the pipeline of its model."""
    recipe = recipe or {}
    generate = recipe.get("generate") or {}
    sampling = {key: generate[key] for key in TRAINED_FOR if generate.get(key) is not None}
    digits = (recipe.get("data") or {}).get("kind") == "digits"
    found = {"prompt_format": "digits" if digits else None, "sampling": sampling, "streaming": recipe.get("streaming")}
    return {key: value for key, value in found.items() if value}


def write_components(
    folder: Path, components: Components, model: Any, code: str | None, recipe: Mapping[str, Any] | None = None
) -> None:
    """Write `model_index.json` and the components' files into `folder`.

    The resolved `recipe` determines how the model reads prompts and is sampled. `code` is the module in the
    transformer folder that defines the class of `model`; if None, diffusers looks up the class that this package
    registers there.
    """
    class_name = type(model).__name__
    index: dict[str, Any] = {"_class_name": PIPELINE, "_diffusers_version": diffusers.__version__}
    if code is not None:
        # AutoModel reads the top-level file, even for a subfolder.
        index["auto_map"] = {AUTO_CLASS: f"{code}.{class_name}"}
    index[TRANSFORMER] = [code or "diffusers", class_name]
    index |= sampling_of(recipe)
    for name, entry in components.classes.items():
        index[name] = [None, None] if components.folder is None else list(entry)
        if components.folder is not None:
            shutil.copytree(components.folder / name, folder / name)
    if components.repository is not None and components.classes:
        index[REFERENCES] = {
            name: {
                "repository": components.repository,
                "revision": components.revision,
                "subfolder": name,
                "library": library,
                "class": part,
            }
            for name, (library, part) in components.classes.items()
        }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
