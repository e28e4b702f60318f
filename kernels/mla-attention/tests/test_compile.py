"""Every kernel compiles ahead of time for its target GPUs, within their limits."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import aot
import pytest

SETS = {
    # One variant per op; `aot.py` without options compiles all of them.
    "what Wan runs": ["--first"],
    "88 latents in 8 and 4 bits": ["expand_kv", "latent_write", "latent_attention", "--matching", "r=88"],
}
RUN = """
import json, sys
import aot

for command in json.loads(sys.argv[1]):
    code = aot.main(command)
    print(json.dumps({"code": code}), flush=True)
"""


@pytest.fixture(scope="module")
def compiled():
    """What `aot.py` prints for a capability and a set, all in one process without the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folders = [str(Path(aot.__file__).parent), str(aot.PACKAGE.parent), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(folders)
    cases = list(itertools.product(aot.TESTED, SETS))
    commands = [[str(capability), *SETS[name]] for capability, name in cases]
    command = [sys.executable, "-c", RUN, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    found, lines = [[]], [json.loads(line) for line in done.stdout.splitlines()]
    for line in lines:
        if "code" in line:
            assert line["code"] == any(one["wrong"] for one in found[-1])
            found.append([])
        else:
            found[-1].append(line)
    return dict(zip(cases, found[:-1], strict=True))


@pytest.mark.parametrize("capability", aot.TESTED)
def test_what_wan_runs_compiles_within_the_limits(compiled, capability):
    everything = compiled[capability, "what Wan runs"]
    assert [found for found in everything if found["wrong"]] == []
    assert {found["name"].partition(" ")[0] for found in everything} == set(aot.VARIANTS)
    # `aot.violations` checks spills, shared memory and tensor memory in this output.
    assert all(found["spilled"] == 0 for found in everything)
    by_tensor_cores = {found["tensor_cores"] for found in everything if found["dot"]}
    assert by_tensor_cores == {aot.TENSOR_CORES[capability]}


@pytest.mark.parametrize("capability", aot.TESTED)
def test_88_latents_in_8_and_4_bits_compile_within_the_limits(compiled, capability):
    everything = compiled[capability, "88 latents in 8 and 4 bits"]
    assert [found for found in everything if found["wrong"]] == []
    assert len(everything) == 3 + 1 + 2 and all(found["spilled"] == 0 for found in everything)
    assert {found["tensor_cores"] for found in everything if found["dot"]} == {aot.TENSOR_CORES[capability]}


def test_every_op_with_a_kernel_is_compiled():
    kernels = {path.stem for path in aot.PACKAGE.glob("*.py") if "\n@jit" in path.read_text(encoding="utf-8")}
    # What kernels of one op call is compiled with them.
    assert kernels - {"common", "latent_step"} == set(aot.VARIANTS)


def test_violations_are_told():
    found = {"capability": 90, "spilled": 8, "shared": 240_000, "tmem": 0, "dot": True, "tensor_cores": "mma"}
    assert aot.violations(found) == [
        "spilled is 8, at most 0",
        "shared is 240000, at most 232448",
        "tensor cores by mma, expected wgmma",
    ]
    assert aot.violations(found | {"spilled": 0, "shared": 1000, "tensor_cores": "wgmma"}) == []
    consumer = found | {"capability": 89, "spilled": 0, "shared": (99 << 10) + 1}
    assert aot.violations(consumer) == ["shared is 101377, at most 101376"]
