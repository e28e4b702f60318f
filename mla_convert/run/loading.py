"""What `StreamingMLAPipeline` is made of: the parts that a folder or repository has, or names."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from ..errors import UserError
from ..export.checkpoint import TRANSFORMER, find_checkpoint, load_checkpoint
from ..export.components import INDEX, PARTS, REFERENCES, SAMPLING, sampling_of
from ..export.manifest import recorded_recipe
from ..files import MANIFEST
from ..load import open_weights, read_json
from ..load.hub import explain_hub_errors

# Parts that have a dtype.
MODELS = ("vae", "text_encoder", "image_encoder")
# Where and how to download; the rest are arguments of diffusers' own `from_pretrained`.
HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision")


def load_arguments(name: str | Path, given: Mapping[str, Any]) -> tuple[Path | None, dict[str, Any]]:
    """A folder and the arguments with which diffusers loads `name` as a pipeline; None and the constructor's own.

    Parts that model_index.json only references are among the arguments, loaded. A folder without
    model_index.json, or one that brings its class along, is read here: diffusers cannot, or would
    import that copy of the class. Raises UserError in one line.
    """
    arguments = {key: value for key, value in given.items() if key not in HUB}
    root, inner = _find(name, {key: given[key] for key in HUB if key in given}, arguments)
    index = read_json(root / INDEX) if (root / INDEX).is_file() else {}
    dtypes = _dtypes(inner, arguments)
    for part, entry in index.get(REFERENCES, {}).items():
        if part not in arguments:
            place = {"subfolder": entry["subfolder"], "revision": entry["revision"]}
            arguments[part] = _load_part(part, entry["library"], entry["class"], dtypes, entry["repository"], **place)
    if index.get(TRANSFORMER, [None])[0] == "diffusers":
        return root, {**arguments, "dtype": dtypes}
    arguments.pop("trust_remote_code", None)
    unknown = [key for key in arguments if key not in (TRANSFORMER, *PARTS, *SAMPLING)]
    if unknown:
        raise UserError(f"{root} is read without diffusers' loader, which alone knows {unknown[0]}; leave it out")
    if TRANSFORMER not in arguments:
        arguments[TRANSFORMER] = load_checkpoint(inner, dtypes[TRANSFORMER])
    for part in PARTS:
        match index.get(part):
            case [str(library), str(class_name)] if part not in arguments:
                arguments[part] = _load_part(part, library, class_name, dtypes, str(root), subfolder=part)
    sampling = sampling_of(recorded_recipe(root)) | {key: index[key] for key in SAMPLING if key in index}
    return None, {**sampling, **arguments}


def _find(name: str | Path, hub: Mapping[str, Any], arguments: Mapping[str, Any]) -> tuple[Path, Path]:
    """Checkpoint and transformer folder here, or of a repository; parts that are given are not downloaded."""
    here = Path(name).expanduser()
    if here.is_dir():
        return find_checkpoint(here)
    wanted = [part for part in (TRANSFORMER, *PARTS) if part not in arguments]
    patterns = [INDEX, MANIFEST, *(f"{part}/*" for part in wanted)]
    with explain_hub_errors(str(name), hub.get("revision")):
        root = Path(snapshot_download(str(name), allow_patterns=patterns, **hub))
    return root, root / TRANSFORMER


def _dtypes(inner: Path, arguments: dict[str, Any]) -> dict[str, torch.dtype]:
    """dtype by part; takes what the caller said of it out of `arguments`."""
    asked = arguments.pop("torch_dtype", None)  # what diffusers called it before
    asked = arguments.pop("dtype", None) or asked
    if isinstance(asked, torch.dtype):
        return dict.fromkeys((TRANSFORMER, "vae", "text_encoder", "default"), asked)
    stored = torch.float32
    if arguments.get(TRANSFORMER) is None:
        tensors = open_weights(inner)
        ((stored, _),) = Counter(tensors.dtype(name) for name in tensors).most_common(1)
    known = {TRANSFORMER: stored, "vae": torch.float32, "text_encoder": torch.bfloat16}
    known |= {"image_encoder": torch.float32, "default": torch.float32}
    return {**known, **(asked or {})}


def _load_part(
    part: str, library: str, class_name: str, dtypes: Mapping[str, torch.dtype], place: str, **where: Any
) -> Any:
    """A part by its own class; `place` is a folder or a repository."""
    loader: Any = getattr(importlib.import_module(library), class_name)
    dtype = {"dtype": dtypes.get(part, dtypes["default"])}
    try:
        with explain_hub_errors(place, where.get("revision")):
            return loader.from_pretrained(place, **where, **(dtype if part in MODELS else {}))
    except OSError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load {part} from {place}: {reason}; pass {part}=None to do without") from None
