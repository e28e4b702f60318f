"""What every process of a launch would say is said once."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import socket
import struct
import subprocess
import sys
import termios

import pytest

from mla_convert.cli.output import hide_bars

SPEAK = """
import logging, os, warnings
from mla_convert.cli import main
from mla_convert.distill.progress import leave_to_the_first

main(["--version"])
if int(os.environ.get("RANK", "0")):
    leave_to_the_first()
logging.getLogger("mla_convert.distill.latents").warning("about the data")
logging.getLogger("mla_convert.pipeline.run").info("a note")
logging.getLogger("mla_convert.pipeline.run").info("a note")
logging.getLogger("mla_convert.mla.kernels").warning("about a device")
logging.getLogger("mla_convert.distill").error("an error")
warnings.warn("of a library")
from diffusers.utils import logging as diffusers
from transformers.utils import logging as transformers
diffusers.get_logger("diffusers.models").warning("by diffusers")
transformers.get_logger("transformers.models").warning("by transformers")
list(transformers.tqdm([1], desc="Loading weights"))
list(diffusers.tqdm([1], desc="Loading checkpoint shards"))
"""
SHARED = ("about the data", "a note", "of a library", "by diffusers", "by transformers")
BARS = ("Loading weights", "Loading checkpoint shards")


@pytest.mark.parametrize(
    ("rank", "local", "terminal", "heard"),
    [
        (None, None, True, ("about a device", *SHARED, *BARS)),
        (0, 0, False, ("about a device", *SHARED, "Loading checkpoint shards")),
        (5, 5, True, ()),
        (8, 0, True, (f"{socket.gethostname()}: about a device",)),
    ],
)
def test_a_launch_says_it_once(rank, local, terminal, heard):
    chosen = ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "PYTHONWARNINGS")
    environment = {name: value for name, value in os.environ.items() if name not in chosen}
    environment |= {} if rank is None else {"WORLD_SIZE": "16", "RANK": str(rank), "LOCAL_RANK": str(local)}
    said = speak(environment, terminal)
    for line in ("about a device", *SHARED, *BARS):
        expected = any(line in part for part in heard)
        assert (line in said) == expected, line
    assert all(part in said for part in heard) and "an error" in said
    assert (f"{socket.gethostname()}: " in said) == (rank in (5, 8))
    # Of each model of a command, the same line.
    assert said.count("a note") == int(rank in (None, 0))


def speak(environment: dict[str, str], terminal: bool) -> str:
    """What SPEAK writes to stderr, a terminal or a pipe."""
    reads, writes = pty.openpty() if terminal else os.pipe()
    if terminal:
        # A new one has no columns, and so no room for bars.
        fcntl.ioctl(writes, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with subprocess.Popen([sys.executable, "-c", SPEAK], env=environment, stderr=writes) as process:
        os.close(writes)
        said = b""
        # Linux raises an error at the end of a terminal.
        with contextlib.suppress(OSError):
            while part := os.read(reads, 4096):
                said += part
        os.close(reads)
        assert process.wait(300) == 0
    return said.decode()


def test_settings_of_a_user_stay():
    environment = {**os.environ, "RANK": "3", "LOCAL_RANK": "3", "DIFFUSERS_VERBOSITY": "warning"}
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", SPEAK],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    assert "by diffusers" in done.stderr and "of a library" in done.stderr and "by transformers" not in done.stderr


def test_json_hides_the_bars_of_libraries_on_a_terminal_too(monkeypatch):
    monkeypatch.setattr(sys, "stderr", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    hide_bars(["run", "demo"])
    assert "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ
    hide_bars(["run", "demo", "--json"])
    assert os.environ.pop("HF_HUB_DISABLE_PROGRESS_BARS") == "1"
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    hide_bars(["run", "demo", "--json"])
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "0"
