"""`bench`: the same pass, dense and latent, side by side."""

from __future__ import annotations

import json

import pytest
import torch

from mla_convert.cli import main
from mla_convert.errors import UsageError
from mla_convert.evaluate.bench import (
    DENSE,
    LATENT,
    ROTATED,
    BenchConfig,
    _layers,
    _steady_pass,
    _table,
    bench,
    verdict,
)
from mla_convert.evaluate.geometry import Geometry
from mla_convert.mla.kernels import Kernels
from mla_convert.mla.rope import rotate

SMALL = Geometry(
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
    config = BenchConfig(position=position, kv_lora_rank=8, qk_rope_head_dim=shared, kernels="torch", repeats=3)
    result = bench(SMALL, config)
    medians = {name: found["median_ms"] for name, found in result["attention"].items()}
    assert result["ratio_attention"] == medians[DENSE] / medians[LATENT]
    assert result["ratio_attention_rotated"] == medians[ROTATED] / medians[LATENT]
    assert all(found["min_ms"] <= found["median_ms"] <= found["max_ms"] for found in result["attention"].values())
    row = 8 + (shared if position in ("decoupled", "baked") else 0)
    assert result["ratio_cache"] == 2 * 24 / row
    assert (result["queries"], result["keys"]) == (12, 30)
    slower = medians[LATENT] / medians[DENSE]
    told = f"{slower:.2f}x the time of dense" if slower >= 1 else f"{1 / slower:.2f}x as fast as dense"
    assert verdict(result) == f"latent: {told} attention, {48 / row:.1f}x less cache"


def test_a_pass_sees_the_whole_window_and_rotated_keys_give_the_same_attention() -> None:
    layers = _layers(SMALL, BenchConfig(kv_lora_rank=8))
    torch.manual_seed(0)
    passes = {}
    for name in (DENSE, ROTATED):
        layer, cache_class = layers[name]
        torch.manual_seed(1)
        passes[name] = (
            layer,
            *_steady_pass(layer, cache_class, SMALL, 1, torch.float32, torch.device("cpu"), Kernels("torch")),
        )
    dense, run, cache = passes[DENSE]
    rotated, run_rotated, cache_rotated = passes[ROTATED]
    rotated.load_state_dict(dense.state_dict())
    run()
    places = cache.places[1]
    assert places.history_frames == [2, 3, 4]
    table = _table(SMALL, torch.device("cpu"))
    for frame, index in zip(places.history_frames, range(3), strict=True):
        slot = cache.causal.slot(frame)
        key, value = cache.rows[0][:, slot].chunk(2, dim=-1)
        turned = rotate(key.unflatten(-1, (2, 12)), table.rotations([index], cache.height, cache.width)).flatten(2)
        cache_rotated.rows[0][:, slot] = torch.cat([turned, value], dim=-1)
    # Observed 1.2e-7: the same numbers, rotated before or after they are cached.
    torch.testing.assert_close(run_rotated(), run(), atol=1e-6, rtol=0)


def test_command(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    out = tmp_path / "bench.json"
    assert main(["bench", "zoo:digits", "--repeats", "1", "--kernels", "torch", "--json", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert printed["ratio_cache"] > 10 and printed["kernels"]["mode"] == "torch"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a DIR or --preset"),
        (["zoo:digits", "--position", "decoupled"], "needs qk_rope_head_dim above 0"),
        (["zoo:digits", "--position", "decoupled", "--qk-rope-head-dim", "3"], "must be even"),
        (["zoo:digits", "--device", "quantum"], "unknown device 'quantum'"),
        (["--preset", "wan9"], "unknown preset 'wan9'"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(UsageError, match="no CUDA device"):
        bench(SMALL, BenchConfig(kv_lora_rank=8, device="cuda"))
