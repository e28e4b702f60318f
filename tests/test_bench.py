"""`bench`: the same pass, dense and latent, side by side."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import mla_attention
import pytest
import torch
from checkpoint_case import pico_mla
from rich.console import Console

from mla_convert.cli import main
from mla_convert.errors import UsageError
from mla_convert.evaluate import bench as bench_module
from mla_convert.evaluate.bench import (
    BY_TORCH,
    DENSE,
    FIRST,
    LATENT,
    LATER,
    PARTS,
    ROTATED,
    STREAMED,
    WRITE,
    BenchConfig,
    _layers,
    _Passes,
    _place,
    _table,
    bench,
)
from mla_convert.evaluate.bench_table import bench_table, verdict
from mla_convert.evaluate.geometry import StreamGeometry
from mla_convert.export.checkpoint import save_checkpoint
from mla_convert.mla import fused, kernels
from mla_convert.mla.kernels import FLOAT32_DEFAULT, Kernels
from mla_convert.mla.rope import rotate

CPU = {"device": "cpu", "dtype": "float32"}
REFUSAL = mla_attention.why_not("cpu", torch.float32)

SMALL = StreamGeometry(
    name="small",
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=12,
    tokens_per_frame=6,
    window_frames=5,
    num_frames_per_block=2,
)


@pytest.mark.parametrize("position", ["decoupled", "derived", "baked", "rotate_on_read"])
def test_ratios_are_those_of_the_medians(position: str) -> None:
    shared = 0 if position == "rotate_on_read" else 4
    config = BenchConfig(position=position, kv_lora_rank=8, qk_rope_head_dim=shared, kernels="torch", repeats=3, **CPU)
    result = bench(SMALL, config)
    for part in PARTS:
        medians = {name: found["median_ms"] for name, found in result[part].items()}
        assert result[f"ratio_{part}"] == medians[DENSE] / medians[LATENT]
        assert all(found["min_ms"] <= found["median_ms"] <= found["max_ms"] for found in result[part].values())
        if part in (FIRST, STREAMED):
            assert result[f"ratio_{part}_rotated"] == medians[ROTATED] / medians[LATENT]
    assert result["attention_later"] == result["attention"] and not any(result["history_kept"].values())
    row = 8 + (shared if position in ("decoupled", "baked") else 0)
    assert result["ratio_cache"] == 2 * 24 / row
    assert (result["queries"], result["keys"]) == (12, 30)
    slower = 1 / result["ratio_attention_streamed"]
    told = f"{slower:.2f}x the time of dense" if slower >= 1 else f"{1 / slower:.2f}x as fast as dense"
    assert verdict(result) == f"latent: {told} attention, {48 / row:.1f}x less cache"
    assert verdict(result | {"ratio_cache": 0.8}).endswith(", 1.2x more cache")


def test_a_pass_sees_the_whole_window_and_rotated_keys_give_the_same_attention() -> None:
    layers = _layers(SMALL, BenchConfig(kv_lora_rank=8))
    torch.manual_seed(0)
    passes = []
    for name in (DENSE, ROTATED):
        torch.manual_seed(1)
        config = BenchConfig(kv_lora_rank=8, **CPU)
        passes.append(_Passes(*layers[name], SMALL, config, torch.float32, torch.device("cpu"), Kernels("torch")))
    dense, rotated = passes
    cache, cache_rotated = dense.cache, rotated.cache
    rotated.layer.load_state_dict(dense.layer.state_dict())
    dense.run()
    history = [2, 3, 4]
    places = cache.places.next(lambda: dense.table, cache, dense.frames)
    assert places.history_slots.tolist() == [cache.causal.slot(frame) for frame in history]
    table = _table(SMALL, torch.device("cpu"))
    for index, frame in enumerate(history):
        slot = cache.causal.slot(frame)
        key, value = cache.rows[0][:, slot].chunk(2, dim=-1)
        turned = rotate(key.unflatten(-1, (2, 12)), table.rotations([index], cache.height, cache.width)).flatten(2)
        cache_rotated.rows[0][:, slot] = torch.cat([turned, value], dim=-1)
    # Observed 1.2e-7: the same numbers, rotated before or after they are cached.
    torch.testing.assert_close(rotated.run(), dense.run(), atol=1e-6, rtol=0)
    for one in passes:
        one.run(write=True)
    slot = cache.causal.slot(5)
    key, value = cache.rows[0][:, slot].chunk(2, dim=-1)
    turned = rotate(key.unflatten(-1, (2, 12)), table.rotations([3], cache.height, cache.width)).flatten(2)
    # Observed 0.
    torch.testing.assert_close(cache_rotated.rows[0][:, slot], torch.cat([turned, value], dim=-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("steps", "kept"), [(1, True), (4, True), (4, False)])
def test_a_chunk_is_a_first_pass_later_ones_and_one_that_writes(
    steps: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean pass of a chunk, with a clock that only counts its calls."""
    clock = itertools.count(1)
    monkeypatch.setattr(bench_module, "_timed", lambda run, device: run() is not None and float(next(clock)))
    monkeypatch.setattr(_Passes, "keeps", kept)
    layer, cache_class = _layers(SMALL, BenchConfig(kv_lora_rank=8))[LATENT]
    config = BenchConfig(kv_lora_rank=8, **CPU)
    one = _Passes(layer, cache_class, SMALL, config, torch.float32, torch.device("cpu"), Kernels("torch"))
    first, later, write = (1, 2, 3) if kept else (1, 1, 2)
    mean = (first + (steps - 1) * later + write) / (steps + 1)
    assert one.timed(steps) == {FIRST: first, LATER: later, WRITE: write, STREAMED: mean}


@pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))
@pytest.mark.parametrize(
    ("free", "kept"),
    # A layer's history takes 30 keys of 2 heads of 12 + 12 channels in float32, 5,760 bytes, and the model has two.
    [(10**9, True), (2 * 11520, True), (2 * 11519, False), (None, False)],
)
def test_the_first_pass_of_every_chunk_expands_and_later_ones_where_nothing_is_kept(
    free: int | None, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "free_memory", lambda device: free)
    expanded: Counter[str] = Counter()
    expand = fused._FusedPass._expand

    def counted(self: Any, *arguments: Any) -> None:
        expanded[type(self.layer).__name__] += 1
        expand(self, *arguments)

    monkeypatch.setattr(fused._FusedPass, "_expand", counted)
    result = bench(SMALL, BenchConfig(kv_lora_rank=8, kernels="triton", repeats=2, **CPU))
    # A round that warms up and two that are timed; without a history that is kept the pass that writes expands, too.
    times = 3 if kept else 6
    assert expanded == {"DenseSelfAttention": times, "LatentSelfAttention": times}
    assert result["history_kept"] == {DENSE: kept, ROTATED: False, LATENT: kept}
    assert result["kernels"]["history"][0] == ("chunk" if kept else "pass")
    # Dense attention has no kernel for its gather and its rotation.
    assert result["note"] == BY_TORCH and BY_TORCH in str(bench_table(result).caption)
    assert (result["attention_later"][LATENT] == result["attention"][LATENT]) is not kept


def test_a_gpu_is_taken_in_16_bits_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda")
    assert _place(BenchConfig()) == (gpu, torch.bfloat16)
    assert _place(BenchConfig(dtype="float32")) == (gpu, torch.float32)
    assert _place(BenchConfig(device="cpu")) == (torch.device("cpu"), torch.float32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _place(BenchConfig()) == (torch.device("cpu"), torch.float32)


def test_the_table_says_that_float32_takes_no_kernel_on_a_gpu() -> None:
    result = bench(SMALL, BenchConfig(kv_lora_rank=8, kernels="torch", repeats=1, **CPU))
    result["kernels"] |= {"mode": "auto", "paths": {"torch": 1}, "refused": {"expand": [FLOAT32_DEFAULT]}}
    assert FLOAT32_DEFAULT in str(bench_table(result).caption)
    assert result["note"] is None and BY_TORCH not in str(bench_table(result).caption)


@pytest.mark.parametrize(("repeats", "spread"), [(1, False), (2, True)])
def test_the_table_fits_80_columns(capsys: pytest.CaptureFixture[str], repeats: int, spread: bool) -> None:
    result = bench(SMALL, BenchConfig(kv_lora_rank=8, layers_per_latent=2, kernels="torch", repeats=repeats, **CPU))
    for one in result["attention_streamed"].values():
        one["median_ms"] *= 1e4
    Console(width=80).print(bench_table(result))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and any("  range" in line for line in lines) is spread
    cells = [line.split("│") for line in lines if line.startswith("│")]
    rows = {first.strip(): [cell.strip() for cell in rest] for _, first, *rest, _ in cells}
    # Every time has the same number of decimals, on one line.
    assert len({cell.partition(".")[2] for cell in rows["streamed"] + rows["first pass"]}) > 1
    assert len({len(cell.partition(".")[2]) for cell in rows["streamed"] + rows["first pass"]}) == 1
    assert {"pass that writes", "cache per layer"} <= rows.keys()


def test_command(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    out = tmp_path / "bench.json"
    assert main(["bench", "zoo:digits", "--repeats", "1", "--kernels", "torch", "--json", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert printed["ratio_cache"] > 10 and printed["kernels"]["mode"] == "torch"
    assert printed["num_inference_steps"] == 4


@pytest.mark.parametrize(
    ("generate", "given", "steps"),
    [
        ({"num_inference_steps": 8, "denoising_steps": [1000, 500]}, (), 2),
        ({"num_inference_steps": 8, "denoising_steps": None}, (), 8),
        ({"num_inference_steps": 8}, ("--steps", "3"), 3),
        ({}, (), 4),
    ],
)
def test_steps_are_those_of_the_recipe(generate: Any, given: Any, steps: int, capsys: Any, tmp_path: Any) -> None:
    save_checkpoint(pico_mla(), tmp_path / "model", {"recipe": {"generate": generate}})
    assert main(["bench", str(tmp_path / "model"), "--repeats", "1", "--json", *given]) == 0
    assert json.loads(capsys.readouterr().out)["num_inference_steps"] == steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give exactly one of DIR and --preset"),
        (["zoo:digits", "--position", "decoupled"], "needs qk_rope_head_dim above 0"),
        (["zoo:digits", "--position", "decoupled", "--qk-rope-head-dim", "3"], "must be even"),
        (["--preset", "digits", "--qk-rope-head-dim", "8"], "leave --qk-rope-head-dim out, or give another --position"),
        (["zoo:digits", "--qk-rope-head-dim", "8"], "rotate_on_read has no shared rotary key"),
        (["zoo:digits", "--device", "quantum"], "unknown device 'quantum'"),
        (["--preset", "wan9"], "unknown preset 'wan9'"),
        (["zoo:digits", "--frames", "1"], "a window holds at least a chunk of 3 frames, got 1; raise"),
        (["zoo:digits", "--layers-per-latent", "3"], "4 layers cannot share latents 3 at a time; one of 1, 2, 4"),
        (["zoo:digits", "--kv-lora-rank", "385"], "kv_lora_rank 385 is out of range; keys and values of a layer have"),
        (["zoo:digits", "--kv-lora-rank", "769", "--layers-per-latent", "2"], "of 2 layers have 768 directions"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.strip().splitlines()[-1].startswith("error: ")
    assert "ValidationError" not in error and "unexpected" not in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(UsageError, match="no CUDA device"):
        bench(SMALL, BenchConfig(kv_lora_rank=8, device="cuda"))
