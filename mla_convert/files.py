"""Write files and folders atomically, lock output folders, and explain errors of the file system."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import logging
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

logger = logging.getLogger(__name__)

MANIFEST = "mla_convert.json"
RUN_STATE, LOCK = "state.json", ".lock"
RESOLVED_RECIPE = "recipe.resolved.yaml"

# linux/fcntl.h and linux/fs.h.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

_UNUSABLE_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EISDIR, errno.ELOOP)


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a missing permission or an unusable path into a one-line UserError about writing `path`.

    A file that may not be read in the meantime is named instead of `path`. Other errors propagate.
    """
    try:
        yield
    except OSError as raised:
        error = _first_cause(raised)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full: cannot write {path}; free some space and run again") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            action = f"write {path}" if _concerns(error, path) else f"open {os.fsdecode(error.filename)}"
            raise UserError(f"no permission to {action}") from None
        if error.errno in _UNUSABLE_PATH and _concerns(error, path):
            raise UserError(f"cannot write {path}: {_reason(error, path)}; choose another place") from None
        raise


def _first_cause(error: OSError) -> OSError:
    """The first error that `shutil.copytree` collected, parsed from its text; other errors are unchanged."""
    collected = error.args[0] if isinstance(error, shutil.Error) and isinstance(error.args[0], list) else []
    for *_, text in collected:
        match = re.match(r"\[Errno (\d+)\] (.*?)(?:: (['\"])(.*?)\3(?: -> .*)?)?$", text)
        if match:
            return OSError(int(match[1]), match[2], match[4])
    return error


def _concerns(error: OSError, path: Path) -> bool:
    """Whether the error is about writing `path`, not about a file that was read in the meantime."""
    if error.filename is None:
        return True
    named, path = (Path(os.path.abspath(os.fsdecode(name))) for name in (error.filename, path))
    written = (path, _temporary(path))
    return any(named in (target, *target.parents) or target in named.parents for target in written)


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
    """Yield a temporary path in the folder of `path`; if the block succeeds, it replaces `path`."""
    temporary = _temporary(path)
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _create(temporary)
        try:
            yield temporary
            _flush(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _create(path: Path) -> None:
    """Create an empty file in place of whatever has its name: writing must not follow another user's link."""
    path.unlink(missing_ok=True)
    path.touch(exist_ok=False)


def _flush(path: Path) -> None:
    """Have a file on the disk before it is renamed, so that after a power cut no name leads to half of it."""
    with path.open("rb") as written:
        os.fsync(written.fileno())


def check_place(path: Path, folder: bool = False) -> None:
    """Raise UserError unless a file, or a folder if `folder`, can be written at `path`; call it before long work.

    Leaves nothing behind. Does not check what a folder contains; `claim_folder` does.
    """
    with explain_os_errors(path):
        if folder and path.exists() and not path.is_dir():
            raise UserError(f"cannot write {path}: it is a file; give the name of a folder")
        if not folder and path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder; give the name of a file")
        path = Path(os.path.abspath(path))
        missing = [parent for parent in path.parents if not parent.exists()]
        temporary = _temporary(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _create(temporary)
            temporary.unlink()
        finally:
            for parent in missing:
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
    """Yield a temporary folder next to `path`; if the block succeeds, it replaces `path`.

    The last of two writers wins.
    """
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    for old in _left_behind(path, ".old.tmp"):
        # A process was killed between the two renames below: restore the old folder.
        if not path.exists():
            old.rename(path)
    for stale in (*_left_behind(path, ".old.tmp"), *_left_behind(path, ".tmp")):
        if not _is_written(stale):
            shutil.rmtree(stale, ignore_errors=True)
    temporary = _temporary(path)
    try:
        with explain_os_errors(path):
            temporary.mkdir()
            yield temporary
            for written in temporary.rglob("*"):
                if written.is_file():
                    _flush(written)
            if path.exists():
                old = temporary
                if not _exchange(temporary, path):
                    old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
                    path.rename(old)
                    temporary.rename(path)
                discard_folder(old)
            else:
                temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_left_behind(path: Path) -> None:
    """Remove what killed processes left of their `atomic_file` at `path`, which no other process may be writing."""
    for stale in _left_behind(path, ".tmp") if path.parent.is_dir() else ():
        stale.unlink()


def discard_folder(path: Path) -> bool:
    """Delete a folder that is no longer needed; if something in it stays, log a warning and return False.

    On NFS, a file that another process has open stays as `.nfsXXXX` until it is closed, and so does its folder.
    """
    shutil.rmtree(path, ignore_errors=True)
    try:
        if path.exists():
            shutil.rmtree(path)
    except OSError as error:
        logger.warning("cannot remove all of %s: %s", path, error)
        return False
    return True


def _left_behind(path: Path, ending: str) -> list[Path]:
    """List what killed processes left of their work on `path`, named `.NAME.PID` with `ending`."""
    # Not a glob: it would match `wan.bf16` for `wan`, and a name may contain glob characters.
    name = re.compile(rf"\.{re.escape(path.name)}\.\d+{re.escape(ending)}")
    return sorted(sibling for sibling in path.parent.iterdir() if name.fullmatch(sibling.name))


def _is_written(temporary: Path) -> bool:
    """Whether another process of this machine may still be writing; a younger one only got its number again."""
    import psutil

    pid = int(temporary.name.removesuffix(".old.tmp").removesuffix(".tmp").rpartition(".")[2])
    try:
        # The time of the boot, from which processes are timed, is in whole seconds.
        return pid != os.getpid() and psutil.Process(pid).create_time() <= temporary.stat().st_mtime + 1
    except (psutil.Error, FileNotFoundError):
        return False


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step, so that a kill leaves one state or the other; False if the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    swapped: int = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return swapped == 0


_held: set[tuple[int, int]] = set()


@contextlib.contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Create the folder `path` if needed and lock it for the block against all other processes, on any machine.

    If the folder was created here and is still empty at the end, it is removed. Raises UserError that names the process
    that holds the lock, or if the folder cannot be locked.
    """
    created = not path.exists()
    try:
        with explain_os_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            # POSIX locks belong to the process: a second one would be granted, and its release would end the first.
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
    """Lock a file in `folder` and return its handle. A POSIX lock works on NFS and ends with a SIGKILL."""
    import fcntl

    while True:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous holder may have removed this file, and another process may have locked a new one.
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
    name = f" ({holder})" if holder else ""
    return UserError(f"another process is working in {folder}{name}; wait for it or give another --out")


def unreadable(error: OSError | UnicodeDecodeError) -> str:
    """In a few words why a text file cannot be read."""
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not UTF-8 text"


def claim_folder(path: Path, kind: str, markers: tuple[str, ...] = (MANIFEST, RUN_STATE)) -> None:
    """Raise UserError if the output folder `path` holds anything but a `kind` that this package wrote.

    A folder may be used if it is missing, empty, or contains one of `markers`: by default, the manifest or run state.
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
    """Write a safetensors file with the mode of any new file. Raises OSError for a disk error, not SafetensorError."""
    # Commands that only read recipes must not wait for PyTorch.
    import safetensors.torch
    from safetensors import SafetensorError

    # safetensors creates files that only their owner may read.
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
    """The SHA-256 hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
