"""What `StreamingMLAPipeline` is made of: the parts that a folder or repository has, or names."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..export.checkpoint import TRANSFORMER, find_checkpoint, load_checkpoint
from ..export.components import INDEX, PARTS, REFERENCES, SAMPLING, sampling_of
from ..export.manifest import read_manifest
from ..files import MANIFEST
from ..load import open_weights, read_json
from ..load.hub import explain_hub_errors

HUB = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "trust_remote_code")


def load_arguments(pipeline: Any, name: str | Path, given: Mapping[str, Any]) -> tuple[Path | None, dict[str, Any]]:
    """A folder and the arguments with which diffusers loads `name` as `pipeline`; None and the constructor's own.

    Parts that model_index.json only references are among the arguments, loaded. A folder without
    model_index.json, or one that brings its class along, is read here: diffusers cannot, or would
    import that copy of the class. Raises UserError in one line.
    """
    arguments = dict(given)
    hub = {key: arguments[key] for key in HUB if key in arguments}
    here = Path(name).expanduser()
    if here.is_dir():
        root, inner = find_checkpoint(here)
    else:
        with explain_hub_errors(str(name), hub.get("revision")):
            root = Path(pipeline.download(str(name), **hub))
        inner = root / TRANSFORMER
    index = read_json(root / INDEX) if (root / INDEX).is_file() else {}
    dtypes = _dtypes(inner, arguments)
    for part, entry in index.get(REFERENCES, {}).items():
        if part not in arguments:
            arguments[part] = _load_part(
                entry["library"],
                entry["class"],
                entry["repository"],
                dtypes,
                part,
                entry["revision"],
                entry["subfolder"],
            )
    if index.get(TRANSFORMER, [None])[0] == "diffusers":
        return root, {**arguments, "torch_dtype": dtypes}
    own = {part: arguments[part] for part in (TRANSFORMER, *PARTS) if part in arguments}
    others = [key for key in arguments if key not in (*own, *HUB, *SAMPLING, "torch_dtype", "dtype", "prompt_format")]
    if others:
        raise UserError(
            f"{root} is read without diffusers' loader, which alone knows {', '.join(others)}; leave it out"
        )
    if TRANSFORMER not in own:
        own[TRANSFORMER] = load_checkpoint(inner, dtypes[TRANSFORMER])
    for part in PARTS:
        library, class_name = index.get(part) or (None, None)
        if part not in own and library is not None and class_name is not None:
            own[part] = _load_part(library, class_name, str(root), dtypes, part, None, part)
    recipe = read_manifest(root).get("recipe") if (root / MANIFEST).is_file() else None
    return None, {**own, **sampling_of(recipe), **{key: index[key] for key in SAMPLING if key in index}}


def _dtypes(inner: Path, arguments: dict[str, Any]) -> dict[str, torch.dtype]:
    """dtype by part; takes what the caller said of it out of `arguments`."""
    asked = arguments.pop("torch_dtype", None)
    asked = arguments.pop("dtype", None) or asked
    if isinstance(asked, torch.dtype):
        return dict.fromkeys((TRANSFORMER, "vae", "text_encoder", "default"), asked)
    stored = torch.float32
    if arguments.get(TRANSFORMER) is None:
        tensors = open_weights(inner)
        ((stored, _),) = Counter(tensors.dtype(name) for name in tensors).most_common(1)
    known = {TRANSFORMER: stored, "vae": torch.float32, "text_encoder": torch.bfloat16, "default": torch.float32}
    return {**known, **(asked or {})}


def _load_part(
    library: str,
    class_name: str,
    place: str,
    dtypes: Mapping[str, torch.dtype],
    part: str,
    revision: str | None,
    sub: str,
) -> Any:
    """A part by its own class; `place` is a folder or a repository."""
    loader: Any = getattr(importlib.import_module(library), class_name)
    more = {"torch_dtype": dtypes.get(part, dtypes["default"])} if part in ("vae", "text_encoder") else {}
    if library == "transformers" and more:
        more = {"dtype": more["torch_dtype"]}
    try:
        with explain_hub_errors(place, revision):
            return loader.from_pretrained(place, subfolder=sub, revision=revision, **more)
    except OSError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load {part} from {place}: {reason}; pass {part}=None to do without") from None
