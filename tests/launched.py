"""Starts the processes of a launch on this machine, without a launcher that would end the others."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

SECONDS = 600
"""Far less than a collective waits."""


class Done(NamedTuple):
    """How a process has ended."""

    code: int
    out: str
    err: str


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def launched(count: int, script: Path, *arguments: str, given: str = "") -> list[Done]:
    """Run a Python script in `count` processes of one thread each; only the first one can read `given` on stdin."""
    launch = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    launch |= {"MASTER_PORT": str(free_ports(1)[0]), "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join(
        [*map(str, (Path(__file__).parent, Path(__file__).parents[1])), os.environ.get("PYTHONPATH", "")]
    )
    started = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdin=subprocess.DEVNULL if rank else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **launch, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
        )
        for rank in range(count)
    ]
    try:
        # What a process writes fits in its pipes.
        texts = [one.communicate(None if rank else given, timeout=SECONDS) for rank, one in enumerate(started)]
    except subprocess.TimeoutExpired:
        for one in started:
            one.kill()
        pytest.fail("\n".join(f"process {rank}: {one.communicate()}" for rank, one in enumerate(started)))
    finally:
        for one in started:
            one.kill()
    return [Done(one.returncode, *text) for one, text in zip(started, texts, strict=True)]
