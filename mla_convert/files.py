"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "mla_convert.json"
RUN_STATE, LOCK = "state.json", ".lock"

# linux/fcntl.h and linux/fs.h.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

_BAD_PLACES = (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EISDIR)


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a missing permission or a place where nothing can be into one clear line about `path`.

    What may not be read meanwhile is named itself.
    """
    try:
        yield
    except OSError as raised:
        error = _first_of(raised)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full: cannot write {path}; free some space and run again") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            what = f"write {path}" if _concerns(error, path) else f"open {os.fsdecode(error.filename)}"
            raise UserError(f"no permission to {what}") from None
        if error.errno in _BAD_PLACES and _concerns(error, path):
            raise UserError(f"cannot write {path}: {_reason(error, path)}; choose another place") from None
        raise


def _first_of(error: OSError) -> OSError:
    """The first of the errors that `shutil.copytree` collects, of which it keeps texts alone; others as they are."""
    collected = error.args[0] if isinstance(error, shutil.Error) and isinstance(error.args[0], list) else []
    for *_, text in collected:
        told = re.match(r"\[Errno (\d+)\] (.*?)(?:: (['\"])(.*?)\3(?: -> .*)?)?$", text)
        if told:
            return OSError(int(told[1]), told[2], told[4])
    return error


def _concerns(error: OSError, path: Path) -> bool:
    """Whether the error is about writing `path`, not about a file that was read meanwhile."""
    if error.filename is None:
        return True
    named, path = (Path(os.path.abspath(os.fsdecode(one))) for one in (error.filename, path))
    places = (path, _temporary(path))
    return any(named in (place, *place.parents) or place in named.parents for place in places)


def _reason(error: OSError, path: Path) -> str:
    for folder in path.parents:
        with contextlib.suppress(OSError):
            if folder.exists() and not folder.is_dir():
                return f"{folder} is a file"
    return os.strerror(error.errno or 0)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it when the block ends well."""
    temporary = _temporary(path)
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def check_place(path: Path, folder: bool = False) -> None:
    """Raise UserError unless a file, or a `folder`, can be written at `path`; call it before long work.

    Nothing is left behind. What stands in a folder is not looked at; see `claim_folder`.
    """
    with explain_os_errors(path):
        if folder and path.exists() and not path.is_dir():
            raise UserError(f"cannot write {path}: it is a file; give the name of a folder")
        if not folder and path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder; give the name of a file")
        path = Path(os.path.abspath(path))
        made = [parent for parent in path.parents if not parent.exists()]
        temporary = _temporary(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            temporary.unlink()
        finally:
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write `path` atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `path` atomically as indented JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its place when the block ends well."""
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    for aside in _left_behind(path, ".old.tmp"):
        # Killed between two renames: the old folder comes back.
        if not path.exists():
            aside.rename(path)
    for stale in (*_left_behind(path, ".old.tmp"), *_left_behind(path, ".tmp")):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = _temporary(path)
    try:
        with explain_os_errors(path):
            temporary.mkdir()
            yield temporary
            if path.exists():
                old = temporary
                if not _exchange(temporary, path):
                    old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
                    path.rename(old)
                    temporary.rename(path)
                shutil.rmtree(old)
            else:
                temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _left_behind(path: Path, ending: str) -> list[Path]:
    """What killed processes left of their work on `path`: its name and a process id, with `ending`."""
    # `wan` is not `wan.bf16`, whose work begins alike, and a name may have a glob's characters.
    name = re.compile(rf"\.{re.escape(path.name)}\.\d+{re.escape(ending)}")
    return sorted(beside for beside in path.parent.iterdir() if name.fullmatch(beside.name))


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step, so that a kill leaves either state; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    swapped: int = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return swapped == 0


_held: set[tuple[int, int]] = set()


@contextlib.contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Make the folder `path` and keep every other process out of it, on other machines too, while the block lasts.

    A folder that was made for this, and in which nothing was written, goes again. Raises UserError that names who
    works there, or that the folder cannot be locked.
    """
    created = not path.exists()
    try:
        with explain_os_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            # The lock is the process's own: a second one of the same process would be granted, and end the first.
            folder = path.stat()
            identity = (folder.st_dev, folder.st_ino)
            if identity in _held:
                raise _busy(path, _this_process())
            handle = _lock(path)
        _held.add(identity)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (path / LOCK).unlink()
            os.close(handle)
            _held.discard(identity)
    finally:
        if created:
            with contextlib.suppress(OSError):
                path.rmdir()


def _lock(folder: Path) -> int:
    """The handle of a locked file in `folder`: a POSIX lock, which NFS knows and which ends with a SIGKILL."""
    import fcntl

    while True:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had the lock until now has removed the file, and somebody else may have locked a new one.
            if _is_at(handle, folder / LOCK):
                os.ftruncate(handle, 0)
                os.write(handle, _this_process().encode())
                return handle
        except OSError as error:
            holder = os.pread(handle, 1000, 0).decode("utf-8", "replace")
            os.close(handle)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _busy(folder, holder) from None
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                (folder / LOCK).unlink(missing_ok=True)
                raise UserError(f"{folder} is on a file system that locks no files; give another --out") from None
            raise
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _busy(folder: Path, holder: str) -> UserError:
    known = f" ({holder})" if holder else ""
    return UserError(f"another process is working in {folder}{known}; wait for it or give another --out")


def unreadable(error: OSError | UnicodeDecodeError) -> str:
    """Why a text cannot be read, in a few words."""
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not UTF-8 text"


def claim_folder(path: Path, kind: str, markers: tuple[str, ...] = (MANIFEST, RUN_STATE)) -> None:
    """Refuse an output folder that holds something that is not a `kind` of ours.

    A folder is ours when it is missing, empty, or has one of `markers` in it: by default our manifest
    or run state.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path} is a file; give the name of a folder")
    ours = any((path / name).exists() for name in markers)
    visible = [p for p in path.iterdir() if not p.name.endswith(".tmp") and p.name != LOCK]
    if visible and not ours:
        raise UserError(f"{path} exists and is not a {kind} of mla-convert; choose another folder or empty it")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with the mode of any new file; an error of the disk, which comes as text, is OSError."""
    # Commands that only read recipes must not wait for PyTorch.
    import safetensors.torch
    from safetensors import SafetensorError

    # safetensors leaves files that only their owner may read.
    path.touch()
    mode = path.stat().st_mode
    try:
        safetensors.torch.save_file(dict(tensors), path, dict(metadata) if metadata else None)
        path.chmod(mode)
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
