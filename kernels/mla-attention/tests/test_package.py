"""The package in other environments: without Triton, from any folder, as a Hub kernel; and without recompilation."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mla_attention
import pytest
import torch
from kernel_case import DEVICE

PACKAGE = Path(importlib.util.find_spec("mla_attention").origin).parent

WITHOUT_TRITON = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ImportError("triton is hidden")

sys.meta_path.insert(0, Hidden())
import torch
import mla_attention
from mla_attention import *

print(why_not("cpu", torch.float32))
query = torch.randn(1, 3, 2, 16)
out, lse = attend(query, query, query, None, 0.25)
assert torch.equal(out, attend_reference(query, query, query, None, 0.25)[0])
print(all(hasattr(mla_attention, name) for name in mla_attention.__all__))
"""

SPECIALISATION = """
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import create_function_from_signature
from mla_attention.attend import _attend_kernel
from mla_attention.expand_kv import _expand_kernel
from mla_attention.latent_attention import _latent_kernel
from mla_attention.latent_write import _write_kernel
from mla_attention.merge import _merge_kernel
from mla_attention.pack import _copy_kernel
from mla_attention.qk_norm_rope import _norm_kernel

def compilations(kernel, *lengths):
    bind = create_function_from_signature(kernel.signature, kernel.params, CUDABackend(GPUTarget("cuda", 90, 32)))
    found = set()
    for value in (1, 2, 16, 1560, 4680, 93600):
        arguments = [value if parameter.name in lengths else 32 for parameter in kernel.params]
        found.add(str(bind(*arguments)[1]))
    return len(found)

print(compilations(_attend_kernel, "queries", "keys"))
print(compilations(_copy_kernel, "keys", "slots_b"))
print(compilations(_expand_kernel, "keys", "slots_b"))
print(compilations(_merge_kernel, "queries", "parts"))
print(compilations(_latent_kernel, "queries", "keys", "slots_b"))
print(compilations(_write_kernel, "length", "slots_b"))
print(compilations(_norm_kernel, "length", "tokens"))
print(compilations(_attend_kernel, "key_h"))
"""


def python(code, tmp_path, *arguments, **env):
    """Lines that `code` prints in a new process in another folder, without the interpreter."""
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    settings["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), settings.get("PYTHONPATH", "")])
    settings.update(env)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=settings, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_works_without_triton(tmp_path):
    reason, complete = python(WITHOUT_TRITON, tmp_path, TRITON_INTERPRET="1")
    assert reason == "Triton cannot be imported: triton is hidden"
    assert complete == "True"


def test_a_second_copy_loads_beside_it(tmp_path):
    """As a Hub kernel does: the same sources under another name, with a separate namespace for the ops."""
    copy = tmp_path / "mla_attention_copy"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    namespace = (PACKAGE / "_ops.py").read_text(encoding="utf-8").replace('"mla_attention"', '"mla_attention_copy"')
    (copy / "_ops.py").write_text(namespace, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(
        copy.name, copy / "__init__.py", submodule_search_locations=[str(copy)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[copy.name] = module
    spec.loader.exec_module(module)

    query = torch.randn(1, 3, 2, 16, device=DEVICE)
    found = [package.attend(query, query, query, None, 0.25)[0] for package in (module, mla_attention)]

    assert module.attend is not mla_attention.attend
    assert hasattr(torch.ops.mla_attention_copy, "attend")
    assert torch.equal(*found)


HUB_KERNEL = """
import sys
from pathlib import Path

import torch
from kernels import get_local_kernel

module = get_local_kernel(Path(sys.argv[1]), backend="cpu", trust_remote_code=True)
query = torch.randn(1, 3, 2, 16)
print(module.attend(query, query, query, None, 0.25)[0].shape == query.shape, hasattr(torch.ops, "mla_attention_hub"))
"""


def test_loads_as_a_kernel_of_the_hub(tmp_path):
    """A hand-made build in kernel-builder's layout: the sources, a separate `_ops.py`, and metadata.json."""
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package kernels is not installed")
    build = tmp_path / "build" / "torch-cpu"
    shutil.copytree(PACKAGE, build, ignore=shutil.ignore_patterns("__pycache__"))
    namespace = (PACKAGE / "_ops.py").read_text(encoding="utf-8").replace('"mla_attention"', '"mla_attention_hub"')
    (build / "_ops.py").write_text(namespace, encoding="utf-8")
    metadata = {
        "id": "_mla_attention_hub", "name": "mla-attention", "version": 1, "license": "Apache-2.0",
        "python-depends": [], "backend": {"type": "cpu"},
    }  # fmt: skip
    (build / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    assert python(HUB_KERNEL, tmp_path, str(tmp_path)) == ["True True"]


def test_build_file():
    """The keys that kernel-builder reads for a pure Python kernel, with an edition that it supports."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    build = tomllib.loads((PACKAGE.parents[1] / "build.toml").read_text(encoding="utf-8"))
    assert set(build) == {"general", "torch-noarch"}
    assert build["general"]["name"].replace("-", "_") == PACKAGE.name
    assert set(build["general"]) == {"name", "version", "edition", "license", "backends"}
    assert (build["general"]["edition"], build["general"]["backends"]) == (5, ["cuda", "cpu"])
    # kernel-builder builds no project without it.
    assert "genKernelFlakeOutputs" in (PACKAGE.parents[1] / "flake.nix").read_text(encoding="utf-8")


def test_lengths_do_not_recompile(tmp_path):
    """Triton specializes on 1 and on multiples of 16, except for arguments that change from chunk to chunk."""
    *lengths, stride = python(SPECIALISATION, tmp_path)
    assert lengths == ["1"] * 7
    assert stride == "3"  # what an argument does that is specialized


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("mps", torch.float16, "kernels run on CUDA devices, not on mps"),
        ("cpu", torch.float64, "torch.float64 is not supported; use float16, bfloat16 or float32"),
    ],
)
def test_why_not(device, dtype, reason):
    assert mla_attention.why_not(device, dtype) == reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is not on where there is a GPU")
def test_why_not_in_the_interpreter():
    assert mla_attention.why_not("cpu", torch.float32) is None
    assert mla_attention.why_not("cpu", torch.bfloat16) == "Triton's interpreter gets bfloat16 wrong; use float32"
    assert mla_attention.why_not("cuda", torch.bfloat16) == "torch sees no CUDA device"


def test_needs_only_torch_and_triton():
    names = set()
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.partition(".")[0])
    assert names - set(sys.stdlib_module_names) == {"torch", "triton"}


def test_what_triton_needs_is_named_where_it_lacks(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "no C compiler (gcc or clang)" in mla_attention.lacking({})
    assert "no C compiler" not in (mla_attention.lacking({"CC": "gcc"}) or "")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": "/nowhere"})
    line = "Triton cannot compile its launchers: no /nowhere/Python.h; install gcc and python3-dev"
    assert mla_attention.lacking({}) == line
