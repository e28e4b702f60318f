"""Makes one video in the processes of a launch: the first one leads, and the others run the model with it.

What the first process reads, encodes and decides reaches the others as words in the launch's own store. A process that
waits there can be told that the video has ended, which one that waits in a collective cannot.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import ProcessGroup, _get_default_store

from ..devices import has_gpu, processes_here
from ..errors import UserError
from ..interrupts import INTERRUPTED, TERMINATED, restore

PATIENCE = 10.0
"""Seconds for which processes wait for each other at the end, so that all exit with the same code."""
_PAUSE = 0.002
_WORDS_KEPT = 16
"""Words that the store keeps. A chunk takes a few, and nobody is a whole chunk behind, because passes are shared."""
_PIECE = 4 << 20
"""Bytes that the store takes at once; torch's own refuses 8 MiB."""
_ENDED, _FAILED, _LEFT = "mla_convert/ended", "mla_convert/failed", "mla_convert/left"


class Ended(Exception):
    """The first process has ended the video, with this exit code; `blamed` on a process that failed, if not empty."""

    def __init__(self, code: int, blamed: str = "") -> None:
        super().__init__(code)
        self.code, self.blamed = code, blamed


class Terminated(UserError):
    """SIGTERM has ended the video, after its file was finished if it had any frames."""

    exit_code = TERMINATED


class Launch:
    """The processes of this launch, each with its own device; `leads` in the first one.

    Raises UserError if the environment describes no launch, there are fewer GPUs than processes on this machine, or the
    GPUs differ.
    """

    current: ClassVar[Launch | None] = None

    def __init__(self) -> None:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise UserError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {' and '.join(missing)} not set; launch the processes "
                "with torchrun, or unset WORLD_SIZE"
            )
        if has_gpu():
            here, gpus = processes_here(), torch.cuda.device_count()
            if here > gpus:
                raise UserError(f"{here} processes on a machine with {gpus} GPUs; give --nproc-per-node {gpus}")
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or 0))
        dist.init_process_group("nccl" if has_gpu() else "gloo")
        assert dist.group.WORLD is not None
        self.group: ProcessGroup = dist.group.WORLD
        _check_one_kind(self.group)
        self.leads = self.group.rank() == 0
        # Its type knows text only.
        self._store: Any = _get_default_store()
        self._words = 0
        self._in_pass = False
        self._received: list[int] = []
        Launch.current = self

    def say(self, word: Any) -> None:
        """Tell the others a word, which `hear` returns there; only in the first process."""
        content = io.BytesIO()
        torch.save(word, content)
        content.seek(0)
        pieces = 0
        while piece := content.read(_PIECE):
            self._store.set(f"{self._key(self._words)}/{pieces}", piece)
            pieces += 1
        # Whoever sees their number finds them all.
        self._store.set(self._key(self._words), str(pieces))
        if self._words >= _WORDS_KEPT:
            old = self._key(self._words - _WORDS_KEPT)
            for key in (old, *self._pieces(old)):
                self._store.delete_key(key)
        self._words += 1

    def hear(self, *allowed: type[Any]) -> Any:
        """The next word of the first process, its tensors on the CPU. Raises Ended once that has ended the video.

        A word may hold objects of the classes `allowed`, besides plain values and tensors.
        """
        self._wait_for(self._key(self._words))
        content = io.BytesIO(b"".join(map(self._store.get, self._pieces(self._key(self._words)))))
        self._words += 1
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(content, map_location="cpu", weights_only=True)

    def led(self, ask: Callable[..., Any] | None) -> Callable[..., Any]:
        """A function whose answers are those of `ask` in the first process; the others need none."""

        def answer(*given: Any) -> Any:
            if not self.leads:
                return self.hear()
            assert ask is not None
            found = ask(*given)
            self.say(found)
            return found

        return answer

    def prompt_at(self, schedule: Callable[[int], Tensor | None] | None) -> Callable[[int], Tensor | None]:
        """The `prompt_at` of `stream_chunks` in all processes, by the `schedule` of the first one.

        It is called where a chunk begins, so this is also where an interrupt ends the video in all of them.
        """

        def begin(frame: int) -> Tensor | None:
            self._in_pass = True
            # A launcher sends SIGTERM to the others of a process that has failed.
            failed = self._failed()
            if self._received or failed:
                self._in_pass = False
                raise RuntimeError if failed else KeyboardInterrupt
            return None if schedule is None else schedule(frame)

        return self.led(begin)

    def chunks(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield `chunks`; an interrupt does not leave the other processes alone in the middle of one."""
        for chunk in chunks:
            self._in_pass = False
            yield chunk

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """A context of the first process; its end, or an error in it, ends the others with the same exit code.

        The first SIGINT or SIGTERM in a pass takes effect at its end. Raises Terminated where SIGTERM has ended the
        video. An existing handler of SIGTERM, or SIG_IGN, is left alone.
        """
        code, blamed = 0, ""
        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            if before[signal.SIGTERM] is not signal.SIG_DFL:
                del before[signal.SIGTERM]
        for number in before:
            signal.signal(number, self._on_signal)
        try:
            yield
        except BaseException as error:
            code = getattr(error, "exit_code", INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1)
            if code == INTERRUPTED and self._received[:1] == [signal.SIGTERM]:
                code = Terminated.exit_code
                raise Terminated("terminated") from None
            if isinstance(error, RuntimeError) and (blamed := self._failed()):
                raise UserError(f"{blamed} failed; see its error message") from None
            raise
        finally:
            try:
                self._end(code, blamed)
            finally:
                # Not before: a launcher sends SIGTERM more than once.
                restore(before)

    def _end(self, code: int, blamed: str) -> None:
        """Tell the others of the end, and wait a while for them to leave."""
        # An error here would hide the first one.
        with contextlib.suppress(dist.DistError):
            self._store.set(_ENDED, f"{code} {blamed}")
            others, patience = self.group.size() - 1, time.monotonic() + PATIENCE
            # In a pass the others wait for this process itself, and its end is theirs.
            while not self._in_pass and self._store.add(_LEFT, 0) < others and time.monotonic() < patience:
                time.sleep(0.01)

    def follow(self, work: Callable[[], None]) -> int:
        """Do `work` in a process that does not lead; returns the exit code of the first process.

        An error in `work` is raised, unless it comes from the end of the first process.
        """
        own, failure = f"process {self.group.rank()}", None
        try:
            work()
        except Ended as ended:
            return self._left(ended)
        except Exception as error:
            failure = error
            with contextlib.suppress(dist.DistError):
                self._store.set(_FAILED, own)
        try:
            self._wait_for(None, math.inf if failure is None else PATIENCE / 2)
        except Ended as ended:
            code = self._left(ended)
            if failure is None or ended.blamed != own:
                return code
        except TimeoutError:
            pass
        assert failure is not None
        raise failure

    def _left(self, ended: Ended) -> int:
        """Leave with the exit code of the first process."""
        with contextlib.suppress(dist.DistError):
            self._store.add(_LEFT, 1)
        return ended.code

    def _failed(self) -> str:
        """The process that failed, empty if none did."""
        return self._store.get(_FAILED).decode() if self._store.check([_FAILED]) else ""

    def _on_signal(self, number: int, frame: Any) -> None:
        first = not self._received
        self._received.append(number)
        # Launchers send SIGTERM more than once, which does not disturb the end of the file.
        if not self._in_pass if first else number == signal.SIGINT:
            raise KeyboardInterrupt

    def _wait_for(self, key: str | None, seconds: float = math.inf) -> None:
        """Return when `key` is set. Raises Ended if the video ends first, and TimeoutError."""
        began = time.monotonic()
        try:
            while key is None or not self._store.check([key]):
                if self._store.check([_ENDED]):
                    code, _, blamed = self._store.get(_ENDED).decode().partition(" ")
                    raise Ended(int(code), blamed)
                waited = time.monotonic() - began
                if waited > seconds:
                    raise TimeoutError
                # The store's own wait would log every look at the end as a warning, or not see it.
                time.sleep(_PAUSE if waited < 1 else 10 * _PAUSE)
        except dist.DistError:
            # The store has ended with the first process.
            raise Ended(1) from None

    def _key(self, word: int) -> str:
        return f"mla_convert/word/{word}"

    def _pieces(self, key: str) -> list[str]:
        """The keys of the pieces of a word."""
        return [f"{key}/{piece}" for piece in range(int(self._store.get(key)))]


def _check_one_kind(group: ProcessGroup) -> None:
    """Raise UserError where GPUs differ, for which processes could choose different kernels and wait forever."""
    names: list[str] = [""] * group.size()
    dist.all_gather_object(names, torch.cuda.get_device_name() if has_gpu() else "CPU", group)
    if len(kinds := sorted(set(names))) > 1:
        raise UserError(f"one video needs GPUs of one kind, but this launch has {' and '.join(kinds)}; leave some out")
