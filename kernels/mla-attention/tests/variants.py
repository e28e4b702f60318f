"""What `aot.py` compiles of every op: the kernels as they would be launched on some geometries, Wan2.1-1.3B's first."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from mla_attention._runtime import Plan
from mla_attention.attend import _attend_kernel, attend_plan
from mla_attention.expand_kv import _expand_kernel, expand_plan
from mla_attention.latent_attention import TILES, _latent_kernel
from mla_attention.latent_tiles import latent_plan
from mla_attention.latent_write import _write_kernel, write_plan
from mla_attention.merge import _merge_kernel, merge_plan
from mla_attention.merge_pair import _merge_pair_kernel
from mla_attention.pack import _copy_kernel, copy_plan
from mla_attention.qk_norm_rope import _norm_kernel, norm_plan
from mla_attention.quantize import row_parts, row_width
from mla_attention.split_query import _split_kernel, split_plan

UNEVEN_ROWS = ("rows_b", "rows_s", "rows_t")
"""Strides of rows that are not multiples of 16 scalars."""


class Variant(NamedTuple):
    """One compilation of a kernel, as it would be launched on the geometry in `name`.

    `types` maps arguments to Triton type names (`*bf16`, `*i32`, `fp32`). An argument that is neither in `types` nor a
    constant of `plan` is an i32. An absent tensor is a constant None. Pointers and integers are assumed to be multiples
    of 16, except those that the kernel lists in `do_not_specialize`, those in UNEVEN of `aot.py` and those in `uneven`.
    `dot` says whether the kernel should use the tensor core instruction of its generation.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    plan: Plan
    dot: bool = True
    uneven: tuple[str, ...] = ()


def _prefix(variant: Variant) -> Variant:
    """The same variant with the number of valid keys on the device."""
    constants = {name: value for name, value in variant.plan.constants.items() if name != "num_keys"}
    types = {**variant.types, "num_keys": "*i32"}
    return variant._replace(
        name=f"{variant.name}, a prefix", types=types, plan=variant.plan._replace(constants=constants)
    )


def _attend(capability: int) -> list[Variant]:
    """Head widths of Wan and other models, all keys or a prefix, and few queries."""
    found = [attend_variant(channels, 4680, capability) for channels in (128, 64, 96, 160, 256)]
    return [*found, _prefix(found[0]), _prefix(attend_variant(128, 32, capability))]


def attend_variant(channels: int, queries: int, capability: int, heads: int = 12) -> Variant:
    """One compilation in bfloat16 with 128 value channels."""
    types = dict.fromkeys(("query", "key", "value", "out"), "*bf16") | {"lse": "*fp32", "scale": "fp32"}
    plan = attend_plan(channels, 128, queries, torch.bfloat16, capability)
    fixed = {"KEY_K": heads * channels, "VALUE_K": heads * 128, "num_keys": None}
    tiles = {"query_tiles": ("BLOCK_Q", channels), "key_tiles": ("BLOCK_K", channels), "value_tiles": ("BLOCK_K", 128)}
    if plan.described:
        types |= {name: f"tensordesc<bf16[{plan.constants[rows]}, {width}]>" for name, (rows, width) in tiles.items()}
    else:
        fixed |= dict.fromkeys(tiles)
    plan = plan._replace(constants={**plan.constants, **fixed})
    name = f"attend D={channels} V=128 Q={queries}"
    # Tensor cores of 9.0 and newer need tiles of at least 64 rows.
    return Variant(name, _attend_kernel, types, plan, dot=queries >= 64)


def _expand_kv(capability: int) -> list[Variant]:
    """Wan's heads, rotated and not, by rank; shared keys; rows in int8, in 8 and 4 bits.

    The recipes that share a latent between two layers use ranks 448 and 1472.
    """
    whole, parts, shared = [(128, 12, True), (128, 12, False)], [(96, 12, False)], [(32, 1, True)]
    cases = [(rank, *case, False) for rank in (448, 192, 64, 128, 200, 256, 1472) for case in whole]
    cases += [(192, *case, False) for case in parts + shared]
    cases += [(rank, *case, True) for rank in (192, 448) for case in whole + shared]
    found = [expand_variant(*case, capability) for case in cases]
    # Rows of 56, 224, 81, 58 and 255 bytes.
    mixed = [(88, 24, 8), (384, 64, 16), (121, 41, 1), (90, 26, 2), (448, 62, 1)]
    uneven = [(121, 1, whole), (90, 2, whole + shared)]
    found += [
        expand_variant(rank, *case, quantized, capability, None, align)
        for rank, align, some in uneven for quantized in (False, True) for case in some
    ]  # fmt: skip
    rows = [(rank, *case, True, capability, eight, align) for rank, eight, align in mixed for case in whole + shared]
    return [*found, *(expand_variant(*case) for case in rows), _prefix(found[0])]


def expand_variant(
    rank: int, channels: int, heads: int, rotated: bool, quantized: bool, capability: int, eight: int | None = None,
    align: int = 16,
) -> Variant:  # fmt: skip
    """One compilation with bfloat16 weights and rows in bfloat16, int8 or 8 and 4 bits."""
    plan = expand_plan(rank, channels, heads, torch.bfloat16, capability, eight, align)
    types = {"out": "*bf16", "rows": "*i8" if quantized else "*bf16", "slots": "*i32"}
    types |= dict.fromkeys(("weight", "bias"), "*bf16")
    optional = {"scales": ("*fp16", quantized), "rotations": ("*fp32", rotated)}
    types |= {name: kind for name, (kind, there) in optional.items() if there}
    fixed = {name: None for name, (_, there) in optional.items() if not there}
    # Triton specializes on arguments that are 1.
    fixed |= {"num_keys": None} | ({"heads": 1} if heads == 1 else {"copies": 1})
    name = f"expand_kv r={rank}, {heads} x {channels} channels" + ", rotated" * rotated
    name += ", int8" * quantized if eight is None else f", {eight} in 8 bits, the others in 4"
    plan = plan._replace(constants={**plan.constants, **fixed})
    return Variant(name, _expand_kernel, types, plan, uneven=UNEVEN_ROWS if align < 16 else ())


def _latent_attention(capability: int) -> list[Variant]:
    """Many queries, by rank and shared channels; few, also to int8, far or packed rows."""
    cases = [(rank, 32, 4680, False, False) for rank in (192, 64, 96, 128, 256, 448, 512)]
    cases += [(rank, shared, 4680, False, False) for rank in (64, 192, 512) for shared in (0, 64)]
    kinds = [(False, False), (True, False), (True, True)]
    cases += [(rank, 64, queries, *kind) for rank in (192, 512) for queries in (1, 64) for kind in kinds]
    found = [latent_variant(*case, capability) for case in cases]
    packed = [(rank, shared, queries) for rank, shared in ((88, 32), (192, 64), (512, 0)) for queries in (1, 64)]
    found += [latent_variant(*case, False, False, capability, True) for case in packed]
    return [*found, _prefix(found[0])]


def latent_variant(
    rank: int, shared: int, queries: int, quantized: bool, far: bool, capability: int, pack: bool = False
) -> Variant:
    """One compilation in bfloat16 with 12 heads."""
    plan = latent_plan(rank, shared, queries * 12, torch.bfloat16, quantized, far, capability, pack=pack)
    gathered = not plan.constants["PACKED"]
    types = dict.fromkeys(("query", "query_pe", "out"), "*bf16") | {
        "rows": "*i8" if quantized else "*bf16",
        "scales": "*fp16",
        "slots": "*i32",
        "rotations": "*fp32",
        "lse": "*fp32",
        "scale": "fp32",
    }
    shapes = dict.fromkeys(TILES, "")
    if plan.described:
        sizes = (f"{plan.constants[rows]}, {plan.constants[width]}" for rows, width in TILES.values())
        shapes = {name: f"tensordesc<bf16[{size}]>" for name, size in zip(TILES, sizes)}  # noqa: B905
    types |= shapes
    there = {"query_pe": shared, "rotations": shared and gathered, "scales": quantized, "slots": gathered}
    there |= {name: plan.described and (shared or "pe" not in name) for name in TILES}
    absent = {name: None for name, wanted in there.items() if not wanted} | {"num_keys": None}
    types = {name: kind for name, kind in types.items() if name not in absent}
    plan = plan._replace(constants={**plan.constants, **absent})
    name = (
        f"latent_attention r={rank} R={shared} Q={queries}" + ", int8" * quantized + ", far" * far + ", packed" * pack
    )
    # Tensor cores of 9.0 and newer need tiles of at least 64 rows.
    return Variant(name, _latent_kernel, types, plan, dot=plan.constants["BLOCK_M"] >= 64)


def _latent_write(capability: int) -> list[Variant]:
    """At Wan's geometry: plain and baked, int8, 8 and 4 bits, a mean key, no shared key."""
    channels, head_dim = 1536, 128
    cases = [(rank, 32, True, False, False, None) for rank in (192, 64, 96, 128, 256, 1024)]
    cases += [(192, 32, False, False, False, None), (192, 0, False, False, False, None)]
    cases += [(192, 32, True, False, True, None), (192, 32, True, True, False, None), (192, 0, False, True, True, None)]
    cases += [(88, 0, False, False, True, 24), (192, 32, True, False, True, 64), (121, 32, False, True, True, 41)]
    found = []
    for rank, shared, baked, mean, quantized, eight in cases:
        align = math.gcd(16, row_width(rank, shared, eight))
        plan = write_plan(
            rank, shared, channels, channels, head_dim, mean, quantized, torch.bfloat16, capability, eight, align
        )
        types = dict.fromkeys(("key", "value", "gain", "mean", "w_kv", "b_kv", "w_pe", "b_pe"), "*bf16") | {
            "rows": "*i8" if quantized else "*bf16",
            "scales": "*fp16",
            "slots": "*i32",
            "grid": "*fp32",
            "eps": "fp32",
        }
        there = {"w_pe": shared, "b_pe": shared, "mean": mean, "grid": baked, "scales": quantized}
        absent = {name: None for name, wanted in there.items() if not wanted}
        types = {name: kind for name, kind in types.items() if name not in absent}
        plan = plan._replace(constants={**plan.constants, **absent})
        name = f"latent_write r={rank} R={shared}" + ", baked" * baked + ", mean" * mean
        name += ", int8" * quantized if eight is None else f", {eight} in 8 bits, the others in 4"
        uneven = UNEVEN_ROWS if align < 16 else ()
        found.append(Variant(name, _write_kernel, types, plan, uneven=uneven))
    return found


def _merge(capability: int) -> list[Variant]:
    """Wan's value channels and for latents."""
    types = {"outs": "*fp32", "lses": "*fp32", "out": "*bf16", "lse": "*fp32"}
    return [Variant(f"merge V={v}", _merge_kernel, types, merge_plan(v), dot=False) for v in (128, 192)]


def _merge_pair(capability: int) -> list[Variant]:
    """Wan's value channels."""
    types = {"out_a": "*bf16", "lse_a": "*fp32", "out_b": "*bf16", "lse_b": "*fp32", "out": "*bf16", "lse": "*fp32"}
    return [Variant("merge_pair V=128", _merge_pair_kernel, types, merge_plan(128), dot=False)]


def _pack(capability: int) -> list[Variant]:
    """Packed latents, and shared keys for one head or for all, also from 8 and 4 bits."""
    found = []
    # The mixed rows have 160, 56 and 113 bytes.
    mixed = ", 8 and 4 bits"
    rows = [(192, 32, None, ""), (192, 32, None, ", int8"), (192, 32, 64, mixed), (88, 0, 24, mixed)]
    for rank, shared, eight, kind in [*rows, (121, 32, 41, mixed)]:
        align = math.gcd(16, row_width(rank, shared, eight))
        first, four, key = row_parts(rank, shared, eight)
        for part, copies in ((first, 1), (four, 1), (key, 1), (key, 12)):
            if not part.count:
                continue
            types = {"out": "*bf16", "rows": "*i8" if kind else "*bf16", "slots": "*i32"}
            optional = {"scales": ("*fp16", bool(kind)), "rotations": ("*fp32", part is key)}
            types |= {name: kind for name, (kind, there) in optional.items() if there}
            fixed = {name: None for name, (_, there) in optional.items() if not there}
            fixed |= {"num_keys": None} | ({"copies": 1} if copies == 1 else {})
            plan = copy_plan(part, part.count, align)
            plan = plan._replace(constants={**plan.constants, **fixed})
            name = f"pack {part.count} channels from {part.first}, {copies} heads{kind}"
            uneven = UNEVEN_ROWS if align < 16 else ()
            found.append(Variant(name, _copy_kernel, types, plan, dot=False, uneven=uneven))
    return [*found, _prefix(found[0])]


def _qk_norm_rope(capability: int) -> list[Variant]:
    """The heads of Wan 1.3B and 14B, rotated, and keys that are cached unrotated."""
    found = []
    for heads, rotated in ((12, True), (12, False), (40, True)):
        types = {"x": "*bf16", "weight": "*bf16", "out": "*bf16", "eps": "fp32"} | (
            {"rotations": "*fp32"} if rotated else {}
        )
        plan = norm_plan(heads * 128, 128)
        if not rotated:
            plan = plan._replace(constants={**plan.constants, "rotations": None})
        name = f"qk_norm_rope H={heads} D=128" + ", rotated" * rotated
        found.append(Variant(name, _norm_kernel, types, plan, dot=False))
    return found


def _split_query(capability: int) -> list[Variant]:
    """The heads of Wan 1.3B and 14B with 16 of 64 pairs rotated."""
    names = ("x", "weight", "still", "turned")
    types = dict.fromkeys(names, "*bf16") | {"rotations": "*fp32", "coefficients": "*fp32", "eps": "fp32"}
    types |= {"still_pairs": "*i64", "turned_pairs": "*i64"}
    return [
        Variant(f"split_query H={heads} D=128", _split_kernel, types, split_plan(128 * heads, 128, 48, 16), dot=False)
        for heads in (12, 40)
    ]


VARIANTS = {
    "attend": _attend,
    "expand_kv": _expand_kv,
    "latent_attention": _latent_attention,
    "latent_write": _latent_write,
    "merge": _merge,
    "merge_pair": _merge_pair,
    "pack": _pack,
    "qk_norm_rope": _qk_norm_rope,
    "split_query": _split_query,
}
"""By module of the package, the variants to compile for a compute capability."""
