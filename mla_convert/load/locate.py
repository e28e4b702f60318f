"""Where a model lies: in this package, in a folder, in a file or on the Hub."""

from __future__ import annotations

import glob
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..errors import UserError
from .hub import download
from .pickles import PICKLES
from .recognise import recognise
from .weights import CONFIG, INDEXES, WEIGHTS, read_config, weight_files

ZOO = Path(__file__).parents[1] / "zoo"
WEIGHT_SUFFIXES = (".safetensors", *PICKLES)
ADAPTER_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_model.bin")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class Located(NamedTuple):
    """A model's folder; `file` if one file in it is the weights, `config` unless there is none."""

    folder: Path
    file: Path | None
    config: Path | None
    revision: str | None = None


def locate(model: str, subfolder: str | None, revision: str | None, file: str | None) -> Located:
    """Find a model and, on the Hub, download it. Raises UserError in one line.

    What cannot be converted is refused by its configuration before its weights are downloaded.
    """
    if file is not None:
        _check_inner(file)
    path = Path(model).expanduser()
    if model.startswith("zoo:"):
        folder = ZOO / model.removeprefix("zoo:") / "teacher"
        if not folder.is_dir():
            known = sorted(f"zoo:{found.parent.name}" for found in ZOO.glob("*/teacher"))
            raise UserError(f"there is no model {model} in this package; it has {', '.join(known) or 'none'}")
        return _in_folder(folder, subfolder, file)
    if path.is_dir():
        return _in_folder(path, subfolder, file)
    if path.is_file():
        if file is not None or subfolder is not None:
            raise UserError(f"{path} is a file; leave {'file' if file else 'subfolder'} out or name its folder")
        _check_suffix(path)
        return Located(path.parent, path, _config_for(path, path.parent))
    if path.suffix in (*WEIGHT_SUFFIXES, ".gguf") or not _HUB_ID.fullmatch(model):
        raise UserError(f"{model} does not exist; give a folder, a weights file, a Hub id or zoo:NAME")
    if file is not None:
        return _file_on_hub(model, subfolder, revision, file)
    return _folder_on_hub(model, subfolder, revision)


def locate_file(model: str, revision: str | None, file: str | None, beside: str) -> tuple[Path, str | None]:
    """A weights file of a folder or a Hub repository, or `model` itself, and the commit on the Hub.

    Without `file` there must be one of `ADAPTER_FILES`. `beside` is fetched too where it lies in the same folder.
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
        if path.suffix in (*WEIGHT_SUFFIXES, ".gguf") or not _HUB_ID.fullmatch(model):
            raise UserError(f"{model} does not exist; give a folder, a weights file or a Hub id")
        wanted = [name for inner in names for name in (inner, (PurePosixPath(inner).parent / beside).as_posix())]
        root = download(model, revision, [glob.escape(name) for name in wanted])
        commit = root.name
    found = next((root / name for name in names if (root / name).is_file()), None)
    if found is None:
        raise UserError(f"{model} has no file {' or '.join(names)}")
    return found, commit


def _in_folder(root: Path, subfolder: str | None, file: str | None) -> Located:
    if file is None:
        folder = _transformer_folder(root, subfolder)
        return Located(folder, None, folder / CONFIG)
    path = root / (subfolder or "") / file
    if not path.is_file():
        raise UserError(f"{root} has no file {path.relative_to(root).as_posix()}")
    return Located(path.parent, path, _config_for(path, root))


def _folder_on_hub(model: str, subfolder: str | None, revision: str | None) -> Located:
    inner = subfolder or "transformer"
    small = [name for folder in ("", f"{inner}/") for name in (f"{folder}{CONFIG}", *(f"{folder}{i}" for i in INDEXES))]
    small += ["model_index.json", "README.md"]
    snapshot = download(model, revision, small)
    commit = snapshot.name
    folder = _transformer_folder(snapshot, subfolder)
    recognise(read_config(folder), folder / CONFIG)
    prefix = "" if folder == snapshot else f"{folder.relative_to(snapshot).as_posix()}/"
    download(model, commit, [*small, *(f"{prefix}{name}" for name in weight_files(folder) or [WEIGHTS])])
    return Located(folder, None, folder / CONFIG, commit)


def _file_on_hub(model: str, subfolder: str | None, revision: str | None, file: str) -> Located:
    name = PurePosixPath(subfolder or "", file)
    beside = (name.parent / CONFIG).as_posix()
    small = [glob.escape(beside), CONFIG, "README.md"]
    snapshot = download(model, revision, small)
    path = snapshot / name
    config = _config_for(path, snapshot)
    if config is not None:
        recognise(read_config(config.parent), config)
    download(model, snapshot.name, [*small, glob.escape(name.as_posix())])
    if not path.is_file():
        raise UserError(f"{model} has no file {name} on the Hub")
    return Located(path.parent, path, config, snapshot.name)


def _config_for(file: Path, root: Path) -> Path | None:
    """config.json beside a weights file or at the root of its model; None where neither names a class."""
    for folder in dict.fromkeys((file.parent, root)):
        if (folder / CONFIG).is_file() and "_class_name" in read_config(folder):
            return folder / CONFIG
    return None


def _check_inner(file: str) -> None:
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"file {file} does not lie in the model's folder; give its path in there")
    _check_suffix(Path(file))


def _check_suffix(file: Path) -> None:
    if file.suffix == ".gguf":
        raise UserError(f"{file}: GGUF weights are quantised; use the checkpoint they were made from")
    if file.suffix not in WEIGHT_SUFFIXES:
        raise UserError(f"{file} is no weights file; those are {', '.join(WEIGHT_SUFFIXES)}")


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
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder} has neither {CONFIG} nor transformer/{CONFIG}; name its transformer with subfolder, "
            "or its weights with file"
        )
    return folder
