"""Loads the components of a `StreamingMLAPipeline` that a folder or repository contains or references."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from .. import registry
from ..errors import UserError, quoted
from ..export.checkpoint import TRANSFORMER, find_checkpoint, load_checkpoint
from ..export.components import INDEX, PARTS, REFERENCES, SAMPLING, sampling_of
from ..export.manifest import recorded_recipe
from ..files import MANIFEST
from ..load import open_weights, read_json
from ..load.formats import SafetensorsFile
from ..load.hub import explain_hub_errors
from ..load.weights import PICKLED_WEIGHTS, WEIGHTS

# Components with a dtype.
MODELS = ("vae", "text_encoder", "image_encoder")
LIBRARIES = ("diffusers", "transformers")
# Arguments for the download; all others are arguments of diffusers' `from_pretrained`.
HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision")


def load_arguments(name: str | Path, given: Mapping[str, Any]) -> tuple[Path | None, dict[str, Any]]:
    """A folder and arguments for diffusers to load `name` as a pipeline, or None and constructor arguments.

    Components that model_index.json only references are loaded and included in the arguments. A folder without
    model_index.json, or with its own copy of the model class, is loaded here, because diffusers cannot read the former
    and would import that copy of the class for the latter. Raises UserError in one line.
    """
    arguments = {key: value for key, value in given.items() if key not in HUB}
    root, inner = _find(name, {key: given[key] for key in HUB if key in given}, arguments)
    index = read_json(root / INDEX) if (root / INDEX).is_file() else {}
    _check_libraries(root, index)
    by_diffusers = _is_installed(index.get(TRANSFORMER))
    dtypes = _dtypes(inner, arguments, by_diffusers)
    for part, entry in index.get(REFERENCES, {}).items():
        if part not in arguments:
            place = {"subfolder": entry["subfolder"], "revision": entry["revision"]}
            arguments[part] = _load_part(part, entry["library"], entry["class"], dtypes, entry["repository"], **place)
    if by_diffusers:
        return root, {**arguments, "dtype": dtypes}
    arguments.pop("trust_remote_code", None)
    unknown = [key for key in arguments if key not in (TRANSFORMER, *PARTS, *SAMPLING)]
    if unknown:
        raise UserError(f"{root} is not loaded by diffusers, so {unknown[0]} is not supported; leave it out")
    if TRANSFORMER not in arguments:
        arguments[TRANSFORMER] = load_checkpoint(inner, dtypes[TRANSFORMER])
    for part in PARTS:
        match index.get(part):
            case [str(library), str(class_name)] if part not in arguments:
                arguments[part] = _load_part(part, library, class_name, dtypes, str(root), subfolder=part)
    sampling = sampling_of(recorded_recipe(root)) | {key: index[key] for key in SAMPLING if key in index}
    return None, {**sampling, **arguments}


def _check_libraries(root: Path, index: Mapping[str, Any]) -> None:
    """Raise UserError for a component from a module that nobody imported: importing it would run the checkpoint's code.

    Not every supported version of diffusers checks this itself.
    """
    for part, entry in {**{part: index.get(part) for part in PARTS}, **index.get(REFERENCES, {})}.items():
        match entry:
            case None | [None, None]:
                continue
            case [str(library), str()]:
                whole = True
            case {"library": str(library)}:
                whole = entry.keys() >= {"class", "repository", "subfolder", "revision"}
            case _:
                library, whole = LIBRARIES[0], False
        if library not in LIBRARIES and library not in sys.modules:
            raise UserError(
                f"{root / INDEX} takes {part} from {quoted(library)}, which is not {' or '.join(LIBRARIES)}; "
                "if that module is yours, import it first"
            )
        if not whole:
            raise UserError(f"{root / INDEX} does not say what {part} is: {quoted(entry)}; export the model again")


def _is_installed(entry: Any) -> bool:
    """Whether diffusers finds the transformer of model_index.json: among its own classes, or in a family's module."""
    library = entry[0] if isinstance(entry, list) else None
    families = registry.families().values()
    modules = {cls.__module__ for family in families for cls in (family.dense_class, family.mla_class)}
    # A pipeline's own `save_pretrained` names the module.
    return library == "diffusers" or library in modules


def _find(name: str | Path, hub: Mapping[str, Any], arguments: Mapping[str, Any]) -> tuple[Path, Path]:
    """Local checkpoint and transformer folders, or those of a repository, without components in `arguments`."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return find_checkpoint(folder)
    wanted = [part for part in (TRANSFORMER, *PARTS) if part not in arguments]
    patterns = [INDEX, MANIFEST, *(f"{part}/*" for part in wanted)]
    with explain_hub_errors(str(name), hub.get("revision")):
        root = Path(snapshot_download(str(name), allow_patterns=patterns, **hub))
    return root, root / TRANSFORMER


def _dtypes(inner: Path, arguments: dict[str, Any], by_diffusers: bool) -> dict[str, torch.dtype]:
    """The dtype of each component; removes the caller's choice from `arguments`."""
    requested = arguments.pop("torch_dtype", None)  # diffusers' earlier name for it
    requested = arguments.pop("dtype", None) or requested
    requested = None if requested == "auto" else requested
    if isinstance(requested, torch.dtype):
        return dict.fromkeys((TRANSFORMER, "vae", "text_encoder", "default"), requested)
    stored = torch.float32
    if arguments.get(TRANSFORMER) is None:
        if by_diffusers and not (inner / PICKLED_WEIGHTS).is_file():
            stored = _saved_dtype(inner, arguments.get("variant"))
        else:
            tensors = open_weights(inner)
            ((stored, _),) = Counter(tensors.dtype(name) for name in tensors).most_common(1)
    defaults = {TRANSFORMER: stored, "vae": torch.float32, "text_encoder": torch.bfloat16}
    defaults |= {"image_encoder": torch.float32, "default": torch.float32}
    return {**defaults, **(requested or {})}


def _saved_dtype(inner: Path, variant: str | None) -> torch.dtype:
    """The dtype of a transformer that diffusers saved; float32 where diffusers is to say what is missing."""
    stem = ".".join(WEIGHTS.split(".")[:-1] + ([variant] if variant else []))
    files = [SafetensorsFile(file) for ending in ("", "-*") for file in inner.glob(f"{stem}{ending}.safetensors")]
    stored = Counter(file.dtype(name) for file in files for name in file.names())
    named = [dtype for dtype, _ in stored.most_common() if isinstance(dtype, torch.dtype)]
    # Most of what quantizing leaves may be modules that are kept in float32.
    return min(named, key=lambda dtype: dtype.itemsize if len(named) < len(stored) else 0, default=torch.float32)


def _load_part(
    part: str, library: str, class_name: str, dtypes: Mapping[str, torch.dtype], place: str, **where: Any
) -> Any:
    """Load a component with its class from `place`, a folder or a repository."""
    loader: Any = getattr(importlib.import_module(library), class_name, None)
    if not hasattr(loader, "from_pretrained"):
        raise UserError(f"cannot load {part} from {place}: {library} has no model class {quoted(class_name)}")
    if part in MODELS:
        where["dtype"] = dtypes.get(part, dtypes["default"])
    if library == "transformers":
        # By default it asks on the terminal whether to run code of the folder.
        where["trust_remote_code"] = False
    try:
        with explain_hub_errors(place, where.get("revision")):
            return loader.from_pretrained(place, **where)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load {part} from {place}: {reason}; pass {part}=None to skip it") from None
