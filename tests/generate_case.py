"""One process of a launch that runs several `generate` commands, each as a launch of its own."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from typing import Any

from mla_convert.cli import leave_processes, main
from mla_convert.errors import UserError
from mla_convert.run import launch
from mla_convert.run.passes import Passes

LEADS = os.environ.get("RANK") == "0"


def interrupting(number: int, after: Any) -> Any:
    """`Passes.chunk` that does something in the middle of the chunk with this number."""
    chunk, made = Passes.chunk, []

    def run(self: Any, *given: Any) -> Any:
        made.append(None)
        if len(made) == number:
            after()
        return chunk(self, *given)

    return run


def fail() -> None:
    raise UserError("this process has no memory left")


def command(port: str, event: str, *arguments: str) -> None:
    """Run one command; an event is what happens in one of the processes meanwhile."""
    os.environ["MASTER_PORT"] = port
    chunk = Passes.chunk
    number = {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM}.get(event)
    if number is not None and (LEADS or number == signal.SIGTERM):
        # A launcher forwards SIGTERM to all processes.
        Passes.chunk = interrupting(3, lambda: os.kill(os.getpid(), number))  # type: ignore[method-assign]
    if event == "fail" and not LEADS:
        Passes.chunk = interrupting(2, fail)  # type: ignore[method-assign]
    try:
        code = main(list(arguments))
    except SystemExit as end:
        code = int(end.code or 0)
    Passes.chunk = chunk  # type: ignore[method-assign]
    leave_processes()
    launch.Launch.current = None
    gc.collect()
    print(f"\ncode {code}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    launch.PATIENCE = 2.0
    for one in json.loads(sys.argv[1]):
        command(*one)
