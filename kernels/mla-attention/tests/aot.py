"""Compile the kernels ahead of time, without a GPU: `python aot.py 90 attend merge` prints one JSON line a variant.

A process of its own, since Triton's interpreter, once chosen, compiles nothing. Every op module offers
`aot_variants(capability)`, the first of which is what Wan2.1-1.3B runs; what the launcher would find out about its
arguments is assumed here. All ops where none is named; with `--first` only the first variant of each. Ends with 1
when a variant spills registers, exceeds a limit of the device or does without the tensor cores it is meant for.
`--loops` adds how many instructions a variant has and how many of them its largest loop.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes of shared memory that one block may use (CUDA C++ Programming Guide, technical specifications)."""

TMEM_COLUMNS = 512
"""Columns of tensor memory of one multiprocessor of compute capability 10.0 (PTX ISA, section on tcgen05)."""

WARP_SIZE = 32

UNEVEN = ("heads", "tokens", "scales_t")
"""Integers that 16 does not divide as Wan2.1-1.3B has them: 12 heads, 1,560 tokens a frame, 4 scales a row."""

TENSOR_CORES = {80: "mma", 90: "wgmma", 100: "tcgen05"}
PACKAGE = Path(importlib.util.find_spec("mla_attention").origin).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if "def aot_variants(" in path.read_text(encoding="utf-8"))


def compiled(variant, capability, count=False):
    """What a variant needs on a compute capability, and which instructions it has; with `count` how many."""
    kernel = variant.kernel
    signature, divisible = {}, []
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        signature[name] = "constexpr" if name in variant.plan.constants else variant.types.get(name, "i32")
        pointer_or_int = signature[name][0] in "*i"
        if pointer_or_int and not parameter.do_not_specialize and name not in UNEVEN:
            divisible.append(index)
    unknown = [name for name in (*variant.types, *variant.plan.constants) if name not in signature]
    if unknown:
        raise KeyError(f"{variant.name}: the kernel has no arguments {unknown}")
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs=variant.plan.constants,
        attrs={(index,): [["tt.divisibility", 16]] for index in divisible},
    )
    target = GPUTarget("cuda", capability, WARP_SIZE)
    binary = triton.compile(source, target=target, options=variant.plan.options())
    usage = resources(binary.asm["cubin"])
    found = {
        "name": variant.name,
        "capability": capability,
        "warps": variant.plan.num_warps,
        "stages": variant.plan.num_stages,
        "registers": usage["REG"],
        "spilled": usage["STACK"] + usage["LOCAL"],
        "shared": binary.metadata.shared,
        "tmem": getattr(binary.metadata, "tmem_size", 0) or 0,
        "dot": variant.dot,
        "tensor_cores": tensor_cores(binary.asm["ptx"]),
    }
    return {**found, **instructions(binary.asm["cubin"])} if count else found


def tensor_cores(ptx):
    """The tensor core instructions in PTX: `mma` (8.0), `wgmma` (9.0) or `tcgen05` (10.0), None without any."""
    found = [name for name in ("tcgen05", "wgmma", "mma") if re.search(rf"\b{name}\.(mma|sync|mma_async)", ptx)]
    return found[0] if found else None


def inspected(cubin, option):
    """What `cuobjdump` says of a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def resources(cubin):
    """REG, and bytes of STACK, SHARED and LOCAL memory, of the one kernel in a cubin; spills go to the stack."""
    found = re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", inspected(cubin, "--dump-resource-usage"))
    return {name: int(value) for name, value in found}


def instructions(cubin):
    """How many instructions the one kernel of a cubin has, and how many lie in its largest loop."""
    return counted(inspected(cubin, "--dump-sass"))


def counted(sass):
    """`instructions` of a listing, up to its end: its last exit or, of conditional exits alone, a jump to itself.

    Behind the end jumps lead back from waits that take long.
    """
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?) *;", sass)
    places = {int(address, 16): place for place, (address, _) in enumerate(lines)}
    jumps = [(place, re.search(r"\bBRA\S* .*?(0x[0-9a-f]+)", code)) for place, (_, code) in enumerate(lines)]
    jumps = [(place, places[int(target[1], 16)]) for place, target in jumps if target]
    exits = [place for place, (_, code) in enumerate(lines) if code == "EXIT"]
    end = exits[-1] if exits else min(place for place, start in jumps if start == place)
    loops = [place - start + 1 for place, start in jumps if start < place < end]
    return {"instructions": len(lines), "loop": max(loops, default=0)}


def violations(found):
    """What is wrong with what `compiled` found, one line each."""
    capability = found["capability"]
    limits = {"spilled": 0, "shared": SHARED_LIMIT[capability], "tmem": TMEM_COLUMNS}
    wrong = [f"{name} is {found[name]}, at most {limit}" for name, limit in limits.items() if found[name] > limit]
    if found["dot"] and found["tensor_cores"] != TENSOR_CORES[capability]:
        wrong.append(f"tensor cores by {found['tensor_cores']}, expected {TENSOR_CORES[capability]}")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capability", type=int, choices=sorted(SHARED_LIMIT))
    parser.add_argument("modules", nargs="*", default=MODULES)
    parser.add_argument("--first", action="store_true", help="only what Wan2.1-1.3B runs")
    parser.add_argument("--loops", action="store_true", help="count instructions, of the largest loop too")
    chosen, failed = parser.parse_args(), False
    for module in chosen.modules or MODULES:
        variants = importlib.import_module(f"mla_attention.{module}").aot_variants(chosen.capability)
        for variant in variants[:1] if chosen.first else variants:
            found = compiled(variant, chosen.capability, chosen.loops)
            found["wrong"] = violations(found)
            failed |= bool(found["wrong"])
            print(json.dumps(found), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
