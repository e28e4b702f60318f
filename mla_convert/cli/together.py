"""Runs a command in the first process of a launch of several, while the others follow it."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from typing import Any, TypeVar, cast

from ..errors import UserError

Command = TypeVar("Command", bound=Callable[..., Any])


def together(command: Command) -> Command:
    """The command for a launch of several processes: all exit with the code of the first one, which alone prints."""

    @functools.wraps(command)
    def run(**options: Any) -> Any:
        if int(os.environ.get("WORLD_SIZE") or 1) == 1:
            return command(**options)
        follows = int(os.environ.get("RANK") or 0) > 0
        if follows:
            # The first process ends them all.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        # Before the processes meet, because this takes a while and the first one may end at once.
        from ..pipeline.job import follow
        from ..run.launch import Launch, Terminated
        from . import leave_processes

        try:
            launch = Launch()
        except UserError as error:
            # The first process of each machine tells what its others would repeat.
            if int(os.environ.get("LOCAL_RANK") or 0):
                raise SystemExit(error.exit_code) from None
            raise
        if follows:
            # Only now, because nobody would end a process whose first one is not there.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            code = follow(launch)
            leave_processes()
            raise SystemExit(code)
        try:
            with launch.leading():
                return command(**options)
        except Terminated:
            leave_processes()
            raise

    return cast(Command, run)
