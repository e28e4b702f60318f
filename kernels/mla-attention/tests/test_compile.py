"""Every kernel compiles ahead of time for the GPUs that it is meant for, within their limits."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import aot
import pytest

PACKAGE = Path(importlib.util.find_spec("mla_attention").origin).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if "def aot_variants(" in path.read_text(encoding="utf-8"))
TENSOR_CORES = {80: "mma", 90: "wgmma", 100: "tcgen05"}


def compile_all(capability, modules):
    """What `aot.py` says of every variant of some modules, in a process without the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), env.get("PYTHONPATH", "")])
    command = [sys.executable, aot.__file__, str(capability), *modules]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_op_with_a_kernel_is_compiled():
    kernels = {path.stem for path in PACKAGE.glob("*.py") if "\n@jit" in path.read_text(encoding="utf-8")}
    assert kernels == set(MODULES)


@pytest.mark.parametrize("capability", sorted(aot.SHARED_LIMIT))
def test_compiles_within_the_limits(capability):
    everything = compile_all(capability, MODULES)
    assert {found["name"].partition(" ")[0] for found in everything} >= set(MODULES)
    for found in everything:
        assert found["spilled"] == 0, found
        assert found["shared"] <= aot.SHARED_LIMIT[capability], found
        assert found["tmem"] <= aot.TMEM_COLUMNS, found
        assert not found["dot"] or found["tensor_cores"] == TENSOR_CORES[capability], found
