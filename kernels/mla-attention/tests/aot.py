"""Compile the kernels ahead of time, without a GPU: `python aot.py 90 attend merge` prints a JSON line per variant.

This needs a separate process, because Triton compiles nothing once its interpreter is chosen. `variants.py` lists what
is compiled of every op; the first variant is what Wan2.1-1.3B runs. Properties of the arguments that the launcher would
detect are assumed here. Without names, all ops are compiled; with `--first`, only the first variant of each; with
`--matching`, those whose name contains a text. The exit code is 1 if a variant spills registers, exceeds a limit of the
device or does not use the expected tensor cores. `--loops` adds the number of instructions of a variant and of its
largest loop.
"""

from __future__ import annotations

import argparse
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
from variants import VARIANTS

SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory available to a thread block (CUDA C++ Programming Guide, technical specifications)."""

TESTED = (80, 90, 100)
"""Capabilities at which no variant may spill. At 8.6, 8.9 and 12.0 some tiles of 8.0 spill a few registers; tiles that
do not spill there need many more instructions for a key."""

TMEM_COLUMNS = 512
"""Columns of tensor memory per multiprocessor at compute capability 10.0 (PTX ISA, section on tcgen05)."""

WARP_SIZE = 32

UNEVEN = ("heads", "tokens", "scales_t")
"""Integers not divisible by 16 in Wan2.1-1.3B: 12 heads, 1,560 tokens per frame, 4 scales per row."""

TENSOR_CORES = {80: "mma", 86: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}
PACKAGE = Path(importlib.util.find_spec("mla_attention").origin).parent


def compiled(variant, capability, count=False):
    """Resources and instructions of a variant at a compute capability; with `count`, also how many instructions."""
    kernel = variant.kernel
    signature, divisible = {}, []
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        signature[name] = "constexpr" if name in variant.plan.constants else variant.types.get(name, "i32")
        pointer_or_int = signature[name][0] in "*i"
        if pointer_or_int and not parameter.do_not_specialize and name not in (*UNEVEN, *variant.uneven):
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
    """The tensor core instruction in PTX: `mma` (8.0), `wgmma` (9.0) or `tcgen05` (10.0); None if there is none."""
    found = [name for name in ("tcgen05", "wgmma", "mma") if re.search(rf"\b{name}\.(mma|sync|mma_async)", ptx)]
    return found[0] if found else None


def inspected(cubin, option):
    """Output of `cuobjdump` with `option` for a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def resources(cubin):
    """REG, and bytes of STACK, SHARED and LOCAL memory, of the only kernel in a cubin; spills go to the stack."""
    found = re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", inspected(cubin, "--dump-resource-usage"))
    return {name: int(value) for name, value in found}


def instructions(cubin):
    """Number of instructions of the only kernel in a cubin, and of its largest loop."""
    return counted(inspected(cubin, "--dump-sass"))


def counted(sass):
    """`instructions` of a listing up to its end: the last exit or, with only conditional exits, a jump to itself.

    Code past the end holds slow paths of waits, whose backward jumps are not loops.
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
    """Problems in a result of `compiled`, one line each."""
    capability = found["capability"]
    limits = {"spilled": 0, "shared": SHARED_LIMIT[capability], "tmem": TMEM_COLUMNS}
    wrong = [f"{name} is {found[name]}, at most {limit}" for name, limit in limits.items() if found[name] > limit]
    if found["dot"] and found["tensor_cores"] != TENSOR_CORES[capability]:
        wrong.append(f"tensor cores by {found['tensor_cores']}, expected {TENSOR_CORES[capability]}")
    return wrong


def main(arguments=None):
    """Compile what `arguments` name and print it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capability", type=int, choices=sorted(SHARED_LIMIT))
    parser.add_argument("modules", nargs="*", default=list(VARIANTS))
    parser.add_argument("--first", action="store_true", help="only what Wan2.1-1.3B runs")
    parser.add_argument("--matching", default="", help="only variants whose name contains this")
    parser.add_argument("--loops", action="store_true", help="count instructions, also of the largest loop")
    chosen, failed = parser.parse_args(arguments), False
    for module in chosen.modules:
        variants = [variant for variant in VARIANTS[module](chosen.capability) if chosen.matching in variant.name]
        for variant in variants[:1] if chosen.first else variants:
            found = compiled(variant, chosen.capability, chosen.loops)
            found["wrong"] = violations(found)
            failed |= bool(found["wrong"])
            print(json.dumps(found), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
