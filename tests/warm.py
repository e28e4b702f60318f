"""Python processes that start with the libraries imported, which takes longer than most of what tests do in them.

They are forks of one server for each worker of pytest. Tests of what an import does, of a launcher, or of how Python
itself ends start ordinary processes instead.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import NamedTuple

import pytest

SECONDS = 600
"""Far less than a collective waits."""

CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = [
    "mla_convert.cli",
    "mla_convert.families",
    "mla_convert.pipeline",
    "mla_convert.distill.encode.videos",
    "mla_convert.run.pipeline",
    "sklearn.datasets",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
]


def server() -> ForkServerContext:
    """What starts forks of the server, which starts with the first one."""
    CONTEXT.set_forkserver_preload(PRELOAD)
    return CONTEXT


class Done(NamedTuple):
    """How a process has ended."""

    code: int
    out: str
    err: str


class Python:
    """`python *arguments`: a script or `-m` and a module, then its arguments; in a session of its own.

    The environment is that of the server, with `changes`. The process reads `given` on stdin, and what it writes goes
    to files.
    """

    def __init__(self, *arguments: str | Path, changes: Mapping[str, str] | None = None, given: str = "") -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        (folder / "in").write_text(given)
        self._files = [folder / name for name in ("in", "out", "err")]
        self._process = server().Process(
            target=_main, args=([*map(str, arguments)], {**os.environ, **(changes or {})}, self._files)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit code, or None while the process runs."""
        return self._process.exitcode

    def finish(self, seconds: float = SECONDS) -> Done:
        """Wait for the end; a process that takes longer than `seconds` fails the test."""
        self._process.join(seconds)
        code, (out, err) = self.poll(), (path.read_text() if path.exists() else "" for path in self._files[1:])
        if code is None:
            self.kill()
            pytest.fail(f"process {self.pid} did not end: {out}{err}")
        return Done(code, out, err)

    def kill(self) -> None:
        """Kill the process, if it runs, with those that it has started."""
        if self.poll() is None:
            # Without a session of its own it has only begun.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.kill()
        self._process.join()


def _main(arguments: list[str], environment: dict[str, str], files: list[Path]) -> None:
    """The body of such a process."""
    os.setsid()
    for number, path in enumerate(files):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = io.TextIOWrapper(open(0, "rb", closefd=False))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    # As in any process; children of this server would use it too.
    multiprocessing.set_start_method(None, force=True)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
