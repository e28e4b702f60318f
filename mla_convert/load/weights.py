"""Reads the files of a model folder: its configuration and its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UserError, few
from .pickles import PICKLES
from .tensors import LazyTensors, Place

CONFIG = "config.json"
WEIGHT_SUFFIXES = (".safetensors", *PICKLES)
WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLED_WEIGHTS = "diffusion_pytorch_model.bin"
INDEX_SUFFIX = ".index.json"
INDEX = f"{WEIGHTS}{INDEX_SUFFIX}"
INDEXES = (INDEX, f"{PICKLED_WEIGHTS}{INDEX_SUFFIX}")
# Endings of an index under any other name; tried only where no known name exists.
INDEX_ENDINGS = (f".safetensors{INDEX_SUFFIX}", f".bin{INDEX_SUFFIX}")


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file that holds one object. Raises UserError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises UserError when it is missing, unreadable or for quantized weights."""
    config = read_json(folder / CONFIG)
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise UserError(
            f"{folder / CONFIG}: the weights are quantized ({method or 'quantization_config'}); "
            "use the checkpoint they were made from"
        )
    return config


def find_index(folder: Path) -> Path | None:
    """The index of a folder's shards, safetensors before pickles; None if there is none.

    An index of another name than `INDEXES` counts only if there is no weights file of a standard name. Raises UserError
    when there are several of those.
    """
    standard = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
    if standard is not None or any((folder / name).is_file() for name in (WEIGHTS, PICKLED_WEIGHTS)):
        return standard
    for ending in INDEX_ENDINGS:
        found = sorted(file for file in folder.glob(f"*{ending}") if file.is_file())
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise UserError(f"{folder} has {len(found)} indexes of weights, {names}; name the one to read with file")
        if found:
            return found[0]
    return None


def shard_names(index: Path) -> list[str]:
    """Names of the shards in an index. Raises UserError."""
    return sorted(set(_weight_map(index).values()))


def open_file(file: Path) -> LazyTensors:
    """The tensors of a weights file, or of the shards in an index. Raises UserError."""
    return _open_shards(file) if file.name.endswith(INDEX_SUFFIX) else LazyTensors.from_files([file])


def open_weights(folder: Path) -> LazyTensors:
    """The tensors of a model folder, sharded or not, safetensors before pickles. Raises UserError."""
    index = find_index(folder)
    if index is not None:
        return _open_shards(index)
    for name, suffixes in ((WEIGHTS, (".safetensors",)), (PICKLED_WEIGHTS, PICKLES)):
        if (folder / name).is_file():
            return LazyTensors.from_files([folder / name])
        others = sorted(file for file in folder.iterdir() if file.suffix in suffixes)
        if len(others) == 1:
            return LazyTensors.from_files(others)
        if others:
            raise UserError(
                f"{folder} has {len(others)} {suffixes[0]} files and no {name}; name the one to read with file"
            )
    if any(file.suffix == ".gguf" for file in folder.iterdir()):
        raise UserError(f"{folder} has only GGUF weights, which are quantized; use the checkpoint they were made from")
    raise UserError(
        f"{folder / WEIGHTS} is missing; if the weights have another name, give it with file{inside(folder)}"
    )


def inside(folder: Path) -> str:
    """The weights files in a folder and two levels below, in parentheses for a message; empty if there are none."""
    files = (file for pattern in ("*", "*/*", "*/*/*") for file in sorted(folder.glob(pattern)))
    names = [file.relative_to(folder).as_posix() for file in files if file.suffix in WEIGHT_SUFFIXES]
    return f" (--file), one of {few(names)}" if names else ""


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and file == Path(file).name for file in weight_map.values()
    ):
        raise UserError(f"{index} has no valid weight_map")
    return weight_map


def _open_shards(index: Path) -> LazyTensors:
    weight_map = _weight_map(index)
    shards = LazyTensors.from_files([index.with_name(file) for file in shard_names(index)])
    absent = next((name for name in weight_map if name not in shards), None)
    if absent is not None:
        raise UserError(f"{index} lists {absent}, but {weight_map[absent]} does not contain it; download both again")
    return LazyTensors({name: Place(index.with_name(file), name) for name, file in weight_map.items()})
