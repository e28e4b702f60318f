"""Runs work in a background thread: the next chunk is computed while the last one is written."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from .video import MIN_PIXELS, Written, save_video

Item = TypeVar("Item")

logger = logging.getLogger(__name__)

WAITING = 2
_PATIENCE = 0.1

LONGEST_CLOSE = 10.0
"""Seconds for which closing `prefetch` waits for its thread."""


class _End:
    """The last item of a queue, with the error that ended it, if any."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class _Channel(Generic[Item]):
    """A bounded queue between two threads that either side can close."""

    def __init__(self, size: int, closed: threading.Event | None = None) -> None:
        self._items: queue.Queue[Item | _End] = queue.Queue(size)
        self.closed = closed or threading.Event()

    def put(self, item: Item | _End) -> bool:
        """Put an item; False if the other side has closed."""
        while not self.closed.is_set():
            with contextlib.suppress(queue.Full):
                self._items.put(item, timeout=_PATIENCE)
                return True
        return False

    def __iter__(self) -> Iterator[Item]:
        while True:
            item = self._items.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item


def prefetch(items: Iterable[Item], count: int = 1, closed: threading.Event | None = None) -> Generator[Item]:
    """Yield the items in order, with up to `count` computed ahead in a thread; with 0 there is no thread.

    Exceptions of the computation are raised here. A caller that stops early sets `closed`, for a computation that can
    stop inside an item, and waits until the current item ends, but at most `LONGEST_CLOSE` seconds: a camera may never
    return. Then a warning is logged; the thread ends with its item, or with the process, and closes the items itself.
    """
    closed = closed or threading.Event()
    if count == 0:
        try:
            yield from items
        finally:
            closed.set()
        return
    channel: _Channel[Item] = _Channel(count, closed)
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def compute() -> None:
        error = None
        try:
            # The current CUDA device is a setting per thread.
            with contextlib.nullcontext() if device is None else torch.cuda.device(device), _closing(items):
                for item in items:
                    if not channel.put(item):
                        return
        except BaseException as caught:
            error = caught
        channel.put(_End(error))

    thread = threading.Thread(target=compute, name="prefetch", daemon=True)
    thread.start()
    try:
        yield from channel
    finally:
        closed.set()
        thread.join(LONGEST_CLOSE)
        if thread.is_alive():
            logger.warning("a video was closed, but its next chunk is not finished; it ends in the background")


def _closing(items: Iterable[Item]) -> contextlib.AbstractContextManager[Any]:
    """Close a generator at the end, in the thread that runs it: another thread cannot while it runs."""
    return contextlib.closing(items) if isinstance(items, Generator) else contextlib.nullcontext()


class FrameWriter:
    """Writes a video file in a thread, with `save_video`, while the next frames are computed.

    At most two chunks wait. The file appears when the writer is closed; `abort` leaves no file. Both can be called at
    any time, also after an error. Exceptions of the thread are raised by the next `put`, or by `close`.
    """

    def __init__(self, path: Path, fps: float, min_pixels: int = MIN_PIXELS) -> None:
        self.path, self.frames, self._ended = path, 0, False
        self._channel: _Channel[Written] = _Channel(WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write, args=(fps, min_pixels), name="frames", daemon=True)
        self._thread.start()

    def _write(self, fps: float, min_pixels: int) -> None:
        try:
            save_video(self._channel, self.path, fps, min_pixels)
        except _Aborted:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._channel.closed.set()

    def put(self, frames: Written) -> None:
        """Queue frames `[F, H, W, 3]`; blocks while two chunks wait.

        Raises ValueError after `end`, `close` or `abort`.
        """
        if self._ended or not self._channel.put(frames):
            self._raise()
            raise ValueError(f"{self.path} has ended and takes no more frames")
        self.frames += len(frames)

    def end(self) -> None:
        """Signal the last frame: the thread finishes the file, and `abort` no longer stops it."""
        self._ended = True
        self._channel.put(_End())

    def close(self) -> None:
        """Wait until all frames are written and the file exists."""
        self.end()
        self._thread.join()
        self._raise()

    def abort(self) -> None:
        """Discard the frames written so far."""
        self._ended = True
        self._channel.put(_End(_Aborted()))
        self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


class _Aborted(Exception):
    """The caller gave up."""
