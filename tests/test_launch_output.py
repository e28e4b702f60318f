"""What every process of a launch would say is said once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

SPEAK = """
import logging, os, warnings
from mla_convert.cli import main
from mla_convert.distill.progress import leave_to_the_first

main(["--version"])
if int(os.environ.get("RANK", "0")):
    leave_to_the_first()
logging.getLogger("mla_convert.distill.latents").warning("about the data")
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
    ("rank", "local", "heard"),
    [
        (None, None, ("about a device", *SHARED, *BARS)),
        (0, 0, ("about a device", *SHARED, *BARS)),
        (5, 5, ()),
        (8, 0, (f"{socket.gethostname()}: about a device",)),
    ],
)
def test_a_launch_says_it_once(rank, local, heard):
    chosen = ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "PYTHONWARNINGS")
    environment = {name: value for name, value in os.environ.items() if name not in chosen}
    environment |= {} if rank is None else {"WORLD_SIZE": "16", "RANK": str(rank), "LOCAL_RANK": str(local)}
    done = subprocess.run(
        [sys.executable, "-c", SPEAK], env=environment, stderr=subprocess.PIPE, text=True, timeout=300, check=True
    )
    for line in ("about a device", *SHARED, *BARS):
        expected = any(line in said for said in heard)
        assert (line in done.stderr) == expected, line
    assert all(said in done.stderr for said in heard) and "an error" in done.stderr
    assert (f"{socket.gethostname()}: " in done.stderr) == (rank in (5, 8))


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
