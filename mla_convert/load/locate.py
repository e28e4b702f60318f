"""Locates a model in this package, in a folder, in a file or on the Hub."""

from __future__ import annotations

import glob
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..errors import UserError
from ..files import RUN_STATE
from .hub import download, is_hub_id
from .recognize import recognize
from .weights import (
    CONFIG,
    INDEX_ENDINGS,
    INDEX_SUFFIX,
    INDEXES,
    WEIGHT_SUFFIXES,
    WEIGHTS,
    find_index,
    inside,
    read_config,
    shard_names,
)

ZOO = Path(__file__).parents[1] / "zoo"
ADAPTER_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_model.bin")


class Located(NamedTuple):
    """A model's folder; `file` is a single file of weights or an index, `config` the path of config.json, if any."""

    folder: Path
    file: Path | None
    config: Path | None
    revision: str | None = None


def locate(model: str, subfolder: str | None, revision: str | None, file: str | None) -> Located:
    """Find a model, and download it if it is on the Hub. Raises UserError in one line.

    A model that cannot be converted is refused because of its configuration, before its weights are downloaded.
    """
    if file is not None:
        _check_inner(file, index=True)
    path = Path(model).expanduser()
    if model.startswith("zoo:"):
        return _in_folder(zoo_folder(model), subfolder, file)
    if path.is_dir():
        return _in_folder(path, subfolder, file)
    if path.is_file():
        if file is not None or subfolder is not None:
            raise UserError(f"{path} is a file; leave {'file' if file else 'subfolder'} out or name its folder")
        _check_suffix(path, index=True)
        return Located(path.parent, path, _config_for(path, path.parent))
    if not is_hub_id(model):
        raise UserError(f"{model} does not exist; give a folder, a weights file, a Hub ID or zoo:NAME")
    if file is not None:
        return _file_on_hub(model, subfolder, revision, file)
    return _folder_on_hub(model, subfolder, revision)


def zoo_folder(model: str) -> Path:
    """The folder of a model in this package, by a name such as `zoo:digits`. Raises UserError."""
    folder = ZOO / model.removeprefix("zoo:") / "teacher"
    if not folder.is_dir():
        included = sorted(f"zoo:{found.parent.name}" for found in ZOO.glob("*/teacher"))
        raise UserError(f"there is no model {model} in this package; it has {', '.join(included) or 'none'}")
    return folder


def locate_file(model: str, revision: str | None, file: str | None, beside: str) -> tuple[Path, str | None]:
    """Find a weights file in a folder or Hub repository, or `model` itself; returns it and the commit on the Hub.

    Without `file`, there must be one of `ADAPTER_FILES`. The file `beside`, in the same folder, is also downloaded.
    Raises UserError in one line.
    """
    path = Path(model).expanduser()
    if file is not None:
        _check_inner(file)
    names = ADAPTER_FILES if file is None else (file,)
    if path.is_file():
        if file is not None:
            raise UserError(f"{path} is a file; leave file out or name its folder")
        _check_suffix(path)
        return path, None
    root, commit = path, None
    if not path.is_dir():
        if not is_hub_id(model):
            raise UserError(f"{model} does not exist; give a folder, a weights file or a Hub ID")
        wanted = [name for inner in names for name in (inner, (PurePosixPath(inner).parent / beside).as_posix())]
        root = download(model, revision, [glob.escape(name) for name in wanted])
        commit = root.name
    found = next((root / name for name in names if (root / name).is_file()), None)
    if found is None:
        raise UserError(f"{model} has no file {' or '.join(names)}")
    return found, commit


def _in_folder(root: Path, subfolder: str | None, file: str | None) -> Located:
    if file is None:
        return _transformer(root, subfolder)
    path = root / (subfolder or "") / file
    if not path.is_file():
        raise UserError(f"{root} has no file {path.relative_to(root).as_posix()}")
    return Located(path.parent, path, _config_for(path, root))


def _transformer(root: Path, subfolder: str | None) -> Located:
    """A model's transformer; without a configuration, `file` is the index of its shards. Raises UserError."""
    folder = _transformer_folder(root, subfolder)
    index = None if (folder / CONFIG).is_file() else find_index(folder)
    return Located(folder, index, folder / CONFIG if index is None else _config_for(index, root))


def _folder_on_hub(model: str, subfolder: str | None, revision: str | None) -> Located:
    places = ("", "transformer/") if subfolder is None else (f"{PurePosixPath(subfolder).as_posix()}/",)
    exact = [glob.escape(f"{place}{name}") for place in places for name in (CONFIG, *INDEXES)]
    small = [*exact, CONFIG, "model_index.json", "README.md"]
    snapshot = download(model, revision, small)
    commit = snapshot.name
    configured = [place for place in places if (snapshot / place / CONFIG).is_file()]
    if not configured and not any((snapshot / place / name).is_file() for place in places for name in INDEXES):
        for place in places:
            _download_beside(model, commit, place, [])
    located = _transformer(snapshot, subfolder)
    if located.config is not None:
        recognize(read_config(located.config.parent), located.config)
    place = "" if located.folder == snapshot else f"{located.folder.relative_to(snapshot).as_posix()}/"
    index = located.file or find_index(located.folder)
    if index is None:
        _download_beside(model, commit, place, [WEIGHTS])
        index = find_index(located.folder)
    if index is not None:
        download(model, commit, [glob.escape(f"{place}{name}") for name in shard_names(index)])
    return located._replace(revision=commit)


def _download_beside(model: str, commit: str, place: str, names: list[str]) -> None:
    """Download `names`, and indexes of any name, directly in the folder `place`."""
    folder = glob.escape(place)
    wanted = [*(glob.escape(name) for name in names), *(f"*{ending}" for ending in INDEX_ENDINGS)]
    # The Hub client's `*` also matches a slash.
    download(model, commit, [f"{folder}{name}" for name in wanted], [f"{folder}*/*"])


def _file_on_hub(model: str, subfolder: str | None, revision: str | None, file: str) -> Located:
    name = PurePosixPath(subfolder or "", file)
    beside = (name.parent / CONFIG).as_posix()
    small = [glob.escape(beside), CONFIG, "README.md"]
    snapshot = download(model, revision, small)
    path = snapshot / name
    config = _config_for(path, snapshot)
    if config is not None:
        recognize(read_config(config.parent), config)
    download(model, snapshot.name, [*small, glob.escape(name.as_posix())])
    if not path.is_file():
        raise UserError(f"{model} has no file {name} on the Hub")
    if file.endswith(INDEX_SUFFIX):
        download(model, snapshot.name, [glob.escape((name.parent / shard).as_posix()) for shard in shard_names(path)])
    return Located(path.parent, path, config, snapshot.name)


def _config_for(file: Path, root: Path) -> Path | None:
    """config.json beside a weights file or at the root of its model; None if neither names a class."""
    for folder in dict.fromkeys((file.parent, root)):
        if (folder / CONFIG).is_file() and "_class_name" in read_config(folder):
            return folder / CONFIG
    return None


def _check_inner(file: str, index: bool = False) -> None:
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"file {file} is not in the model's folder; give a path relative to it")
    _check_suffix(Path(file), index)


def _check_suffix(file: Path, index: bool = False) -> None:
    """Raise UserError unless `file` is a weights file or, with `index`, an index of shards."""
    if file.suffix == ".gguf":
        raise UserError(f"{file}: GGUF weights are quantized; use the checkpoint they were made from")
    if file.suffix not in WEIGHT_SUFFIXES and not (index and file.name.endswith(INDEX_SUFFIX)):
        raise UserError(f"{file} is not a weights file; use one of {', '.join(WEIGHT_SUFFIXES)}")


def _transformer_folder(folder: Path, subfolder: str | None) -> Path:
    """The folder of the transformer in a model's folder. Raises UserError."""
    if subfolder is not None:
        if not (folder / subfolder).is_dir():
            raise UserError(f"{folder} has no folder {subfolder}")
        return folder / subfolder
    is_pipeline = (folder / "model_index.json").is_file() or not (folder / CONFIG).is_file()
    inner = folder / "transformer"
    if is_pipeline and inner.is_dir():
        return inner
    if not (folder / CONFIG).is_file() and find_index(folder) is None:
        if (folder / RUN_STATE).is_file():
            raise UserError(
                f"{folder} is a run folder; name a model in it with --subfolder, such as checkpoint/transformer"
            )
        raise UserError(
            f"{folder} has neither {CONFIG} nor transformer/{CONFIG}; name its transformer with subfolder, "
            f"or its weights with file{inside(folder)}"
        )
    return folder
