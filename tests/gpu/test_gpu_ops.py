"""The kernels on a GPU at the sizes of Wan2.1-1.3B, compared with float64 and with torch's own error."""

from __future__ import annotations

import sys
from typing import Any

import mla_attention as ops
import pytest
import torch
import torch.nn.functional as F
from mla_attention import attend_tiles
from mla_attention._runtime import capability, tile_family
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, DEPTH, TOKENS, WINDOW, SHARED = 12, 128, 1560, 21, 32
QUERIES, KEYS, SCALE = 520, WINDOW * TOKENS, DEPTH**-0.5
"""A ninth of a chunk's queries: the float64 logits of all of them take 15 GB."""
DTYPES = [torch.bfloat16, torch.float16]
RANKS = [64, 96, 128, 192, 256, 448, 512]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (scale * torch.randn(*shape, device="cuda", generator=generator)).to(dtype)


def error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference relative to that of `expected`; NaN where anything is NaN."""
    return float((found.double() - expected).norm() / expected.norm())


def rotations(keys: int, pairs: int) -> Tensor:
    angles = randn(keys, pairs, seed=9, scale=3.0)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def sdpa_error(query: Tensor, key: Tensor, value: Tensor, expected: Tensor) -> float:
    # Which backend torch would take depends on its version and on that of cuDNN.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        found = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), scale=SCALE)
    return error(found.transpose(1, 2), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [0, 1, 5])
def test_attend(splits: int, dtype: torch.dtype) -> None:
    query, key, value = (randn(1, n, HEADS, DEPTH, dtype=dtype, seed=n) for n in (QUERIES, KEYS, KEYS + 1))
    value = value[:, :KEYS]
    expected, expected_lse = ops.attend_reference(query.double(), key.double(), value.double(), None, SCALE)
    out, lse = ops.attend(query, key, value, None, SCALE, splits)
    assert error(out, expected) <= 1.2 * sdpa_error(query, key, value, expected)
    assert error(lse, expected_lse) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [0, 1])
def test_described_attend(splits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles copied by the tensor memory accelerator: histories of two items, with NaN past their end in a workspace."""
    family = tile_family(capability(torch.device("cuda")))
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no tensor memory accelerator")
    if family == 80:
        pytest.skip("no described tiles for this device")
    tiles = attend_tiles.DESCRIBED.get(family, attend_tiles.Tiles(128, 128, 8, 2, described=True))
    monkeypatch.setitem(attend_tiles.DESCRIBED, family, tiles)
    described: list[Any] = []
    module = sys.modules["mla_attention.attend"]
    describe = module.describe
    monkeypatch.setattr(module, "describe", lambda *given: described.append(given) or describe(*given))
    history, count = 3 * TOKENS, 3 * TOKENS - 7
    query, key, value = (randn(2, n, HEADS, DEPTH, dtype=dtype, seed=n) for n in (QUERIES, 4 * TOKENS, 4 * TOKENS + 1))
    value = value[:, : 4 * TOKENS]
    valid = key[:, :count].clone(), value[:, :count].clone()
    key[:, count:], value[:, count:] = float("nan"), float("nan")
    expected, expected_lse = ops.attend_reference(query.double(), *(x.double() for x in valid), None, SCALE)
    num_keys = torch.tensor([count], dtype=torch.int32, device="cuda")

    out, lse = ops.attend(query, key[:, :history], value[:, :history], num_keys, SCALE, splits)

    assert len(described) == 3 and count % 64
    assert error(out, expected) <= 1.2 * sdpa_error(query, *valid, expected)
    assert error(lse, expected_lse) < 1e-5


def ring(rank: int, shared: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a full ring in which one stale slot is NaN, the slots in reading order, and the number of keys."""
    rows = randn(1, WINDOW + 1, TOKENS, rank + shared, dtype=dtype, seed=1)
    rows[:, 5] = float("nan")
    slots = torch.tensor([0, *range(6, WINDOW + 1), *range(1, 5)], dtype=torch.int32, device="cuda")
    return rows, slots, torch.tensor([len(slots) * TOKENS - 7], dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("queries", [16, 128])
def test_latent_attention(queries: int, rank: int, dtype: torch.dtype) -> None:
    """With gathered rows and with packed rows."""
    rows, slots, count = ring(rank, SHARED, dtype)
    turn = rotations(len(slots) * TOKENS, SHARED // 2)
    latent, pe = (randn(1, queries, HEADS, n, dtype=dtype, seed=n) for n in (rank, SHARED))
    arguments = (latent.double(), pe.double(), rows.double(), None, slots, count, turn.double(), SCALE)
    expected, expected_lse = ops.latent_attention_reference(*arguments)
    out, lse = ops.latent_attention(latent, pe, rows, None, slots, count, turn, SCALE, 0)
    valid = rows[:, slots].flatten(1, 2)[:, : int(count)]
    x, y = valid[..., rank:].double().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turn[: int(count)].double().unbind(-1)
    shared = torch.stack([x * cos - y * sin, x * sin + y * cos], dim=-1).flatten(-2).to(dtype)
    key = torch.cat([valid[..., :rank], shared], dim=-1).unsqueeze(2).expand(-1, -1, HEADS, -1)
    value = valid[..., :rank].unsqueeze(2).expand(-1, -1, HEADS, -1)
    assert error(out, expected) <= 1.2 * sdpa_error(torch.cat([latent, pe], dim=-1), key, value, expected)
    assert error(lse, expected_lse) < 2e-3


@pytest.mark.parametrize("rank", [64, 192, 512])
@pytest.mark.parametrize("queries", [16, 128])
def test_latent_attention_to_int8_rows(queries: int, rank: int) -> None:
    rows, slots, count = ring(rank, SHARED, torch.float32)
    steps, scales = ops.quantize_rows(rows.nan_to_num())
    turn = rotations(len(slots) * TOKENS, SHARED // 2)
    latent, pe = (randn(1, queries, HEADS, n, dtype=torch.bfloat16, seed=n) for n in (rank, SHARED))
    arguments = (latent.double(), pe.double(), steps, scales, slots, count, turn.double(), SCALE)
    expected, _ = ops.latent_attention_reference(*arguments)
    out, _ = ops.latent_attention(latent, pe, steps, scales, slots, count, turn, SCALE, 0)
    assert error(out, expected) < 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotate_heads", [True, False])
@pytest.mark.parametrize("rank", RANKS)
def test_expand(rank: int, rotate_heads: bool, dtype: torch.dtype) -> None:
    shared = 0 if rotate_heads else SHARED
    nope = DEPTH - shared
    rows, slots, count = ring(rank, shared, dtype)
    keys = len(slots) * TOKENS
    turn = rotations(keys, (DEPTH if rotate_heads else shared) // 2)
    weight, bias = (
        randn(HEADS * (nope + DEPTH), rank, dtype=dtype, seed=4, scale=rank**-0.5),
        randn(HEADS * (nope + DEPTH), dtype=dtype, seed=5),
    )
    rest = (None, slots, count, weight, bias, None, None, turn, rotate_heads)
    found = [torch.full((1, keys, HEADS, DEPTH), float("nan"), dtype=dtype, device="cuda") for _ in range(2)]
    ops.expand_kv_(*found, rows, *rest)
    expected = [x.double() for x in found]
    ops.expand_kv_reference(*expected, rows.double(), *(wide(x) for x in rest))
    valid = int(count)
    for actual, exact in zip(found, expected, strict=True):
        # One rounding of the result.
        assert error(actual[:, :valid], exact[:, :valid]) < 2 * torch.finfo(dtype).eps / 2
        assert bool(actual[:, valid:].isnan().all())


MIXED = [(88, 24), (192, 64), (624, 64), (121, 41)]
"""Ranks, and how many of the latents have 8 bits if the others have 4."""


@pytest.mark.parametrize("rotate_heads", [True, False])
@pytest.mark.parametrize(("rank", "eight"), MIXED)
def test_expand_from_8_and_4_bits(rank: int, eight: int, rotate_heads: bool) -> None:
    shared = 0 if rotate_heads else SHARED
    nope, keys = DEPTH - shared, WINDOW * TOKENS
    rows, slots, count = ring(rank, shared, torch.float32)
    steps, scales = ops.quantize_rows(rows.nan_to_num(), eight, rank)
    scales[:, 5] = float("nan")
    weight = randn(HEADS * (nope + DEPTH), rank, dtype=torch.bfloat16, seed=4, scale=rank**-0.5)
    bias = randn(len(weight), dtype=torch.bfloat16, seed=5)
    turn = rotations(keys, (DEPTH if rotate_heads else shared) // 2)
    rest = (steps, scales, slots, count, weight, bias, None, None, turn, rotate_heads)
    found = [torch.full((1, keys, HEADS, DEPTH), float("nan"), dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    ops.expand_kv_(*found, *rest, eight)
    expected = [x.double() for x in found]
    ops.expand_kv_reference(*expected, *(wide(x) for x in rest), eight)
    valid = int(count)
    for actual, exact in zip(found, expected, strict=True):
        # Rows are rounded to bfloat16 before the product, and its result is.
        assert error(actual[:, :valid], exact[:, :valid]) < 2 * torch.finfo(torch.bfloat16).eps / 2
        assert bool(actual[:, valid:].isnan().all())


@pytest.mark.parametrize("queries", [16, 128])
@pytest.mark.parametrize(("rank", "eight"), [(88, 24), (192, 64), (121, 41), (512, 128)])
def test_latent_attention_to_8_and_4_bits(rank: int, eight: int, queries: int) -> None:
    rows, slots, count = ring(rank, SHARED, torch.float32)
    steps, scales = ops.quantize_rows(rows.nan_to_num(), eight, rank)
    turn = rotations(len(slots) * TOKENS, SHARED // 2)
    latent, pe = (randn(1, queries, HEADS, n, dtype=torch.bfloat16, seed=n) for n in (rank, SHARED))
    rest = (slots, count, turn.double(), SCALE)
    expected, _ = ops.latent_attention_reference(latent.double(), pe.double(), steps, scales, *rest, eight=eight)
    scales[:, 5] = float("nan")
    out, _ = ops.latent_attention(latent, pe, steps, scales, slots, count, turn, SCALE, 0, eight)
    assert error(out, expected) < 1e-2


@pytest.mark.parametrize("shared", [0, SHARED])
@pytest.mark.parametrize(("rank", "eight"), MIXED)
def test_write_in_8_and_4_bits(rank: int, eight: int, shared: int) -> None:
    """As far from the rows in float64 as their best rounding, and to the bit where the input is equal."""
    channels, dtype = HEADS * DEPTH, torch.bfloat16
    slots = torch.tensor([3, 0], dtype=torch.int32, device="cuda")
    width = rank + shared
    arguments = [
        randn(1, 2 * TOKENS, channels, dtype=dtype, seed=1), randn(1, 2 * TOKENS, channels, dtype=dtype, seed=2),
        1 + randn(channels, dtype=dtype, seed=3, scale=0.1), 1e-6, None,
        randn(rank, 2 * channels, dtype=dtype, seed=4, scale=(2 * channels) ** -0.5), randn(rank, dtype=dtype, seed=5),
        randn(shared, channels, dtype=dtype, seed=6, scale=channels**-0.5) if shared else None,
        randn(shared, dtype=dtype, seed=7) if shared else None, None, HEADS,
    ]  # fmt: skip
    exact = torch.zeros(1, 5, TOKENS, width, dtype=torch.float64, device="cuda")
    ops.latent_write_reference(exact, None, slots, *(wide(x) for x in arguments))
    best = ops.dequantize_rows(*ops.quantize_rows(exact, eight, rank), torch.float64, eight, rank)[:, slots]
    empty, of_empty = ops.quantize_rows(exact, eight, rank)
    rows, scales = torch.full_like(empty, -128), torch.full_like(of_empty, float("nan"))
    ops.latent_write_(rows, scales, slots, *arguments, eight)
    found = ops.dequantize_rows(rows[:, slots], scales[:, slots], torch.float64, eight, rank)
    assert error(found, exact[:, slots]) < 1.05 * error(best, exact[:, slots])
    assert bool((rows[:, [1, 4]] == -128).all()) and bool(scales[:, [1, 4]].isnan().all())
    # The product with zeros leaves the biases, which are exact.
    for weight in (arguments[5], *([arguments[7]] if shared else [])):
        weight.zero_()
    ops.latent_write_(rows, scales, slots, *arguments, eight)
    bias = torch.cat([x.float() for x in (arguments[6], arguments[8]) if x is not None])
    steps, expected = ops.quantize_rows(bias, eight, rank)
    assert bool((rows[:, slots] == steps).all()) and bool((scales[:, slots] == expected).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("baked", [True, False])
def test_write(baked: bool, dtype: torch.dtype) -> None:
    rank, channels = 192, HEADS * DEPTH
    slots = torch.tensor([3, 0, 2], dtype=torch.int32, device="cuda")
    rows = torch.full((1, 5, TOKENS, rank + SHARED), float("nan"), dtype=dtype, device="cuda")
    arguments = [
        randn(1, 3 * TOKENS, channels, dtype=dtype, seed=1), randn(1, 3 * TOKENS, channels, dtype=dtype, seed=2),
        1 + randn(channels, dtype=dtype, seed=3, scale=0.1), 1e-6, None,
        randn(rank, 2 * channels, dtype=dtype, seed=4, scale=(2 * channels) ** -0.5), randn(rank, dtype=dtype, seed=5),
        randn(SHARED, channels, dtype=dtype, seed=6, scale=channels**-0.5), randn(SHARED, dtype=dtype, seed=7),
        rotations(3 * TOKENS, DEPTH // 2) if baked else None, HEADS,
    ]  # fmt: skip
    ops.latent_write_(rows, None, slots, *arguments)
    exact = torch.zeros(rows.shape, dtype=torch.float64, device="cuda")
    ops.latent_write_reference(exact, None, slots, *(x.double() if isinstance(x, Tensor) else x for x in arguments))
    assert error(rows[:, slots], exact[:, slots]) < 2 * torch.finfo(dtype).eps
    assert bool(rows[:, [1, 4]].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_rotation(dtype: torch.dtype) -> None:
    x, weight = randn(2, 4680, HEADS * DEPTH, dtype=dtype), 1 + randn(HEADS * DEPTH, dtype=dtype, seed=1, scale=0.1)
    turn = rotations(4680, DEPTH // 2)
    exact = ops.qk_norm_rope_reference(x.double(), weight.double(), 1e-6, turn.double(), HEADS)
    assert error(ops.qk_norm_rope(x, weight, 1e-6, turn, HEADS), exact) < torch.finfo(dtype).eps


def test_lengths_do_not_recompile() -> None:
    from mla_attention.attend import _attend_kernel
    from mla_attention.latent_attention import _latent_kernel
    from mla_attention.pack import _copy_kernel

    def compiled(kernel: Any) -> int:
        return len(kernel.device_caches[torch.cuda.current_device()][0])

    counts = []
    for frames in range(3, 12):
        keys = frames * 100 + 1
        query, key = (randn(1, n, 2, 64, dtype=torch.bfloat16) for n in (300, keys))
        ops.attend(query, key, key, torch.tensor([keys], dtype=torch.int32, device="cuda"), 0.1)
        rows = randn(1, frames, 101, 96, dtype=torch.bfloat16)
        slots = torch.arange(frames, dtype=torch.int32, device="cuda")
        count = torch.tensor([frames * 101], dtype=torch.int32, device="cuda")
        for queries in (300, 600):
            latent, pe = (randn(1, queries, 2, n, dtype=torch.bfloat16) for n in (64, 32))
            ops.latent_attention(latent, pe, rows, None, slots, count, rotations(frames * 101, 16), 0.1)
        counts.append([compiled(kernel) for kernel in (_attend_kernel, _latent_kernel, _copy_kernel)])
    assert counts[0] == counts[-1]


def test_launches_do_not_wait() -> None:
    """In this mode, torch raises if an op makes the host wait for the device."""
    query, key = (randn(1, n, 2, 64, dtype=torch.bfloat16) for n in (300, 500))
    count = torch.tensor([400], dtype=torch.int32, device="cuda")
    ops.attend(query, key, key, count, 0.1, 0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.attend(query, key, key, count, 0.1, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
def test_split_queries(dtype: torch.dtype) -> None:
    x, weight = randn(2, 4680, HEADS * DEPTH, dtype=dtype), 1 + randn(HEADS * DEPTH, dtype=dtype, seed=1, scale=0.1)
    turn, coefficients = rotations(4680, DEPTH // 2), randn(HEADS, SHARED // 2, 2, seed=2)
    pairs = torch.arange(DEPTH // 2, device="cuda")
    rest = coefficients, pairs[SHARED // 2 :], pairs[: SHARED // 2], HEADS
    wide = (coefficients.double(), *rest[1:])
    exact = ops.split_query_reference(x.double(), weight.double(), 1e-6, turn.double(), *wide)
    for found, expected in zip(ops.split_query(x, weight, 1e-6, turn, *rest), exact, strict=True):
        assert error(found, expected) < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_two_parts(dtype: torch.dtype) -> None:
    outs = [randn(2, 4680, HEADS, DEPTH, dtype=dtype, seed=seed) for seed in (0, 1)]
    lses = [randn(2, HEADS, 4680, seed=seed, scale=3.0) for seed in (2, 3)]
    lses[0][:, 3] = float("-inf")
    outs[0][:, :, 3] = float("nan")
    stacked = ops.merge_reference(torch.stack(outs).double(), torch.stack(lses).double())[0]
    assert error(ops.merge_pair(outs[0], lses[0], outs[1], lses[1])[0], stacked) < torch.finfo(dtype).eps
