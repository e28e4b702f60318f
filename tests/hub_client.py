"""Runs `mla-convert` commands in children of one process that was started with a test Hub's address."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.forkserver
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hub_server import OWNER

from mla_convert.cli import main

# Started with the first child, so with the environment of that moment.
CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = ["mla_convert.cli", "mla_convert.export.hub", "mla_convert.families"]


def stop_forkserver() -> None:
    """Stop this process's only fork server, because it keeps the environment it was started with."""
    multiprocessing.forkserver._forkserver._stop()


class Result(NamedTuple):
    """The result of a command."""

    code: int | None
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line of an error."""
        assert self.code in (1, 2)
        (line,) = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in self.err
        return line.removeprefix("error: ")


def in_child(work: Callable[..., Any], arguments: list[Any], token: str | None, patient: bool, stem: str) -> None:
    """Target of a child process: `work(arguments)` with its own stdout and stderr."""
    for number, name in ((1, f"{stem}.out"), (2, f"{stem}.err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    if not patient:
        time.sleep = lambda seconds: None
    code = work(arguments)
    sys.stdout.flush()
    sys.exit(code)


def command_line(arguments: list[str]) -> int:
    return main(arguments)


class Client:
    """Runs commands in children of one process that was started with the server's address."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        stop_forkserver()
        CONTEXT.set_forkserver_preload(PRELOAD)

    def start(self, work: Callable[..., Any], arguments: list[Any], token: str | None, patient: bool = True) -> Any:
        self.count += 1
        stem = str(self.folder / str(self.count))
        child = CONTEXT.Process(target=in_child, args=(work, arguments, token, patient, stem))
        child.start()
        child.stem = stem
        return child

    def finish(self, child: Any) -> Result:
        child.join(60)
        assert child.exitcode is not None
        result = Result(child.exitcode, Path(f"{child.stem}.out").read_text(), Path(f"{child.stem}.err").read_text())
        for text in (result.out, result.err):
            assert not any(secret in text for secret in ("SecretToken", "SecretSignature"))
        return result

    def push(self, *arguments: Any, token: str | None = OWNER, patient: bool = True) -> Result:
        line = ["push", *(str(argument) for argument in arguments)]
        return self.finish(self.start(command_line, line, token, patient))

    def json(self, *arguments: Any, token: str | None = OWNER) -> dict[str, Any]:
        return self.push(*arguments, "--json", token=token).json
