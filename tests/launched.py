"""Starts the processes of a launch on this machine, without a launcher that would end the others."""

from __future__ import annotations

import socket
from pathlib import Path

from warm import Done, Python


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def launch(count: int) -> list[dict[str, str]]:
    """What the environments of `count` processes of one thread each have that are those of a launch."""
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_ports(1)[0]), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def start(count: int, *arguments: str | Path, given: str = "") -> list[Python]:
    """Start the processes of a launch; only the first one can read `given` on stdin."""
    return [
        Python(*arguments, changes=changes, given="" if rank else given) for rank, changes in enumerate(launch(count))
    ]


def launched(count: int, *arguments: str | Path, given: str = "") -> list[Done]:
    """Run `start` to the end."""
    started = start(count, *arguments, given=given)
    try:
        return [one.finish() for one in started]
    finally:
        for one in started:
            one.kill()
