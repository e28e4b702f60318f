"""Opens shards and reads from them, again where a network file system fails for a moment."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

OPEN_FILES = 32
READERS = 16
"""Shards that are read at once where something is asked of all of them; each waits for the disk most of the time."""

Unreadable = (pa.ArrowException, OSError)

# A server that was restarted, or a file that another machine has replaced, answers the next attempt.
_PASSING = (errno.EIO, errno.ESTALE)
_RETRY_AFTER = (0.2, 2.0)


def read_from(path: Path, read: Callable[[pq.ParquetFile], Result]) -> Result:
    """`read(shard)` for the shard at `path`, which stays open for later calls.

    EIO and ESTALE are tried again twice, with the file opened anew. Other errors, of `Unreadable`, propagate.
    """
    return patiently(lambda: read(_open(path, os.getpid())), _open.cache_clear)


def read_once(path: Path, read: Callable[[pq.ParquetFile], Result]) -> Result:
    """Like `read_from`, but the shard is closed again; several threads may call it."""

    def opened() -> Result:
        with pq.ParquetFile(path) as shard:
            return read(shard)

    return patiently(opened)


def patiently(attempt: Callable[[], Result], forget: Callable[[], None] = lambda: None) -> Result:
    """`attempt()`; EIO and ESTALE are tried again twice, each time after `forget()`."""
    for seconds in _RETRY_AFTER:
        try:
            return attempt()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            forget()
            time.sleep(seconds)
    return attempt()


@functools.lru_cache(maxsize=OPEN_FILES)
def _open(path: Path, process: int) -> pq.ParquetFile:
    """An open shard. The `process` ID is part of the cache key: a forked loader must not share its parent's handle.

    It is not mapped into memory: an I/O error or a truncation would end the process with SIGBUS.
    """
    return pq.ParquetFile(path)


@functools.lru_cache(maxsize=1)
def row_group(path: Path, process: int, group: int, columns: tuple[str, ...]) -> pa.Table:
    """A row group of several clips, decoded whole; the last one is cached because the next clip may be in it."""
    return read_from(path, lambda shard: shard.read_row_group(group, columns=list(columns), use_threads=False))


def reason_of(error: Exception) -> str:
    """Why a shard cannot be read, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the errors of reading the shard at `path` into a UserError."""
    try:
        yield
    except Unreadable as error:
        raise UserError(f"cannot read {path}: {reason_of(error)}; if it is truncated, write it again") from None


def clips_in(path: Path) -> int:
    """The number of clips in a shard. Raises UserError if it cannot be read."""
    with explained(path):
        return int(read_once(path, lambda shard: shard.metadata.num_rows))


def read_notes(path: Path) -> dict[str, str]:
    """The `notes` that `write_shard` wrote to a shard's metadata. Raises UserError if it cannot be read."""
    with explained(path):
        return read_once(path, notes_in)


def notes_in(shard: pq.ParquetFile) -> dict[str, str]:
    """The metadata of an open shard."""
    metadata = shard.metadata.metadata or {}
    return {key.decode(errors="replace"): value.decode(errors="replace") for key, value in metadata.items()}


def of_all(ask: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`ask(item)` of every item, in order, asked by `READERS` threads. The first error ends it and propagates."""
    pool = ThreadPoolExecutor(READERS)
    try:
        return list(pool.map(ask, items))
    finally:
        pool.shutdown(cancel_futures=True)
