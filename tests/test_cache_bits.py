"""Latents in 8 and 4 bits: how they are packed, what they cost, what streams with them and what refuses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mla_attention
import pico
import pytest
import test_graph
import torch
from recipe_case import RECIPE, write_teacher
from safetensors.torch import load_file

from mla_convert import StreamingMLAPipeline
from mla_convert.cli import main
from mla_convert.convert import ConvertConfig, convert_model
from mla_convert.errors import UsageError, UserError
from mla_convert.evaluate.geometry import preset
from mla_convert.evaluate.memory import plan
from mla_convert.export.checkpoint import load_checkpoint, save_checkpoint
from mla_convert.export.config import ExportConfig
from mla_convert.export.release import export
from mla_convert.families.wan import FAMILY
from mla_convert.mla import fused, graph
from mla_convert.mla import kernels as kernels_module
from mla_convert.mla.bits import RowBits, check_bits, format_bits, parse_bits, row_bits, row_bytes
from mla_convert.mla.quantized import (
    GROUP_OF_FOUR,
    Int8LatentCache,
    MixedLatentCache,
    dequantize,
    pack,
    quantize,
    unpack,
)
from mla_convert.pipeline.checks import check_recipe
from mla_convert.recipe.load import parse_recipe
from mla_convert.recipe.schema import validate
from mla_convert.run.batch import StreamBatch
from mla_convert.run.stream import stream_chunks
from mla_convert.run.streaming import StreamingConfig

FRAMES, HEIGHT, WIDTH = 9, 6, 4
MIXED = ((6, 8), (14, 4))


def layout_of(variant: dict[str, Any]) -> str:
    return f"{variant['position']}-{variant['own_chunk']}"


def student(variant: dict[str, Any] | None = None, layers: int = 2, **changes: Any) -> Any:
    dense = pico.dense_model(heads=3, layers=layers)
    return pico.convert(dense, **(variant or pico.VARIANTS[6]) | {"kv_lora_rank": 14} | changes)


def streamed(model: Any, cache: Any = None, frames: int = FRAMES) -> torch.Tensor:
    latents, timestep, text = pico.inputs(2, frames, HEIGHT, WIDTH)
    model.set_cache(cache or "auto")
    ring = model.init_cache(2, HEIGHT, WIDTH)
    with torch.no_grad():
        chunks = [
            model.forward_chunk(latents[:, :, a:b], timestep[:, a:b], text, ring, write=True)
            for a, b in model.causal.chunks(frames)
        ]
    return torch.cat(chunks, dim=2)


def test_two_numbers_to_a_byte_are_unpacked_exactly() -> None:
    pairs = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8).view(4, -1)
    packed = pack(pairs)
    assert packed.dtype == torch.int8 and packed.shape == (4, pairs.shape[1] // 2)
    assert len(packed.unique()) == 256 and torch.equal(unpack(packed), pairs)
    # The first of two in the low half.
    assert pack(torch.tensor([3, -2], dtype=torch.int8)).item() & 0xFF == 0xE3


@pytest.mark.parametrize("width", [2, 32, 64, 76])
def test_error_of_four_bits_is_half_a_step_of_its_group(width: int) -> None:
    rows = torch.randn(3, 5, width) * torch.logspace(-3, 3, 5).view(-1, 1)
    values, scales = quantize(rows, GROUP_OF_FOUR, 7)
    assert values.abs().max() == 7 and scales.shape == (3, 5, -(-width // GROUP_OF_FOUR))
    step = scales.float().repeat_interleave(GROUP_OF_FOUR, dim=-1)[..., :width]
    found = dequantize(unpack(pack(values)), scales, GROUP_OF_FOUR)
    assert ((found - rows).abs() <= 0.51 * step + 0.004 * rows.abs()).all()


@pytest.mark.parametrize(
    ("cache", "latents", "key", "expected"),
    [
        (((24, 8), (64, 4)), 88, 0, RowBits(24, 64, 0)),
        # The last pair takes what is left, more or less than it says.
        (((24, 8), (64, 4)), 112, 0, RowBits(24, 88, 0)),
        (((24, 8), (64, 4)), 30, 6, RowBits(24, 6, 6)),
        (((24, 8), (64, 4)), 20, 8, RowBits(20, 0, 8)),
        # An odd number would leave half a byte.
        (((24, 8), (64, 4)), 87, 0, RowBits(25, 62, 0)),
        (((64, 4),), 15, 0, RowBits(1, 14, 0)),
        (((8, 8), (16, 8), (1, 4)), 88, 0, RowBits(24, 64, 0)),
        # The rows of a latent that lies in those of another layer.
        (((24, 8), (64, 4)), 0, 0, RowBits(0, 0, 0)),
    ],
)
def test_bits_of_a_row(cache: Any, latents: int, key: int, expected: RowBits) -> None:
    found = row_bits(cache, latents, key)
    assert found == expected and found.scalars == latents + key


def test_bytes_of_a_row() -> None:
    assert row_bytes("auto", 32, 0, 2) == 64
    assert row_bytes("int8", 60, 0, 2) == row_bytes(((60, 8),), 60, 0, 2) == 62
    # 24 and 32 of values, one scale and two.
    assert row_bytes(((24, 8), (64, 4)), 88, 0, 2) == 24 + 32 + 2 + 2 * 2
    assert row_bytes(((24, 8), (64, 4)), 88, 8, 4) == 24 + 32 + 8 + 2 + 2 * 2 + 2


@pytest.mark.parametrize("cache", ["auto", "int8", MIXED, ((20, 4),)], ids=str)
@pytest.mark.parametrize("variant", pico.VARIANTS[::2], ids=layout_of)
def test_a_cache_takes_the_bytes_that_are_told(variant: dict[str, Any], cache: Any) -> None:
    model = student(variant)
    scalars = model.init_cache(2, HEIGHT, WIDTH).scalars_per_token()
    model.set_cache(cache)
    for device in ("cpu", "meta"):
        ring = model.init_cache(2, HEIGHT, WIDTH, device=device)
        told_bytes = sum(row_bytes(cache, *model.mla.row_parts(layer), 4) for layer in range(len(model.blocks)))
        assert ring.bytes() == 2 * 5 * 6 * told_bytes
        assert ring.scalars_per_token() == scalars
    # A dtype that is asked for goes before.
    assert type(model.init_cache(1, HEIGHT, WIDTH, dtype=torch.int8)) is Int8LatentCache


def test_rows_come_back_as_they_were_quantized() -> None:
    model = student(pico.VARIANTS[0])
    model.set_cache(MIXED)
    ring = model.init_cache(2, HEIGHT, WIDTH)
    rows = torch.randn(2, 2 * 6, 14 + 6)
    ring.put(ring.kept(0), ring.slots([3, 4]), rows)
    expected = torch.cat(
        [
            dequantize(*quantize(rows[..., :6])),
            dequantize(*quantize(rows[..., 6:14], GROUP_OF_FOUR, 7), GROUP_OF_FOUR),
            dequantize(*quantize(rows[..., 14:])),
        ],
        dim=-1,
    )
    assert torch.equal(ring.take(ring.kept(0), ring.slots([3, 4])), expected)
    assert torch.equal(ring.take(ring.kept(0), ring.slots([4])), expected[:, 6:])


@pytest.mark.parametrize("variant", pico.VARIANTS, ids=layout_of)
def test_a_rollout_with_a_mixed_cache(variant: dict[str, Any]) -> None:
    model = student(variant)
    expected = streamed(model)
    errors = [pico.relative_error(streamed(model, cache), expected) for cache in ("int8", MIXED, ((14, 4),))]
    # Observed 3e-4 to 5e-4, 1.0e-3 to 2.2e-3 and 5e-3 to 1.0e-2 of the largest: all in 8 bits, 6 of 14, none.
    assert 0 < errors[0] < errors[1] < errors[2]
    assert errors[0] < 2e-3 and errors[1] < 1e-2 and errors[2] < 4e-2


def test_a_shared_latent_is_rounded_once() -> None:
    model = pico.convert(pico.dense_model(layers=4), layers_per_latent=2, kv_lora_rank=15)
    model.set_cache(((4, 8), (11, 4)))
    ring = model.init_cache(1, HEIGHT, WIDTH)
    assert isinstance(ring, MixedLatentCache)
    assert ring.bits == [RowBits(5, 10, 0), RowBits(0, 0, 0)] * 2
    assert ring.bytes() == 2 * 5 * 6 * (5 + 5 + 2 + 2) and ring.scalars_per_token() == 15 / 2
    assert 0 < pico.relative_error(streamed(model, ((4, 8), (11, 4))), streamed(model)) < 4e-2


@pytest.mark.parametrize("variant", [pico.VARIANTS[0], pico.VARIANTS[6]], ids=layout_of)
def test_streams_that_share_a_pool_are_those_that_are_alone(variant: dict[str, Any]) -> None:
    model, text = student(variant), pico.inputs(2, 1, HEIGHT, WIDTH)[2]
    model.set_cache(MIXED)
    expected = [
        torch.cat(list(stream_chunks(model, text[i : i + 1], 8, HEIGHT, WIDTH, num_inference_steps=2, seed=i)), dim=2)
        for i in range(2)
    ]
    batch = StreamBatch(model, lanes=2, height=HEIGHT, width=WIDTH, num_inference_steps=2)
    assert isinstance(batch.pool.caches[0], MixedLatentCache)
    assert batch.bytes() == model.init_cache(2, HEIGHT, WIDTH).bytes()
    made: dict[int, list[torch.Tensor]] = {}
    numbers = [batch.join(text[0], seed=0, num_frames=8)]
    for round_ in range(6):
        if round_ == 1:
            numbers.append(batch.join(text[1], seed=1, num_frames=8))
        for chunk in batch.step():
            made.setdefault(chunk.stream, []).append(chunk.latents)
    for number, alone in zip(numbers, expected, strict=True):
        # Observed 6e-8 to 9e-8; where a value rounds to the next step of 4 bits it would be a hundredth.
        assert pico.relative_error(torch.cat(made[number], dim=1), alone[0]) < 2e-2


def test_replayed_passes_are_those_that_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = student()
    model.set_cache(MIXED)
    monkeypatch.setattr(graph, "why_not_graph", lambda model, cache: None)
    monkeypatch.setattr(graph, "CUDARecorder", lambda device, beside: test_graph.Tape(beside))
    monkeypatch.setattr(test_graph.Tape, "captures", 0)
    actual = test_graph.rolled_out(model)
    assert test_graph.Tape.captures == 1
    monkeypatch.setattr(graph, "why_not_graph", lambda model, cache: "off")
    assert torch.equal(actual, test_graph.rolled_out(model))


# Frames of chunks of two, of which the third wraps the ring and the last one is short; the interpreter is slow.
WRAPPED = 7
needs_kernels = pytest.mark.skipif(reason := mla_attention.why_not("cpu", torch.float32), reason=str(reason))


@needs_kernels
@pytest.mark.parametrize("cache", [MIXED, ((14, 4),)], ids=str)
@pytest.mark.parametrize(
    ("variant", "path"),
    [(pico.VARIANTS[0], "absorbed"), *((variant, "expand") for variant in pico.VARIANTS[::2])],
    ids=lambda v: v if isinstance(v, str) else layout_of(v),
)
def test_kernels_equal_torch(variant: dict[str, Any], path: str, cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "PATHS", (path,))
    model = student(variant, layers=1, key_mean=path == "expand")
    expected = streamed(model, cache, WRAPPED)
    report = model.set_kernels("triton").report
    # Observed 1.6e-7 to 1.0e-5; where a value rounds to the next step of 4 bits it would be a hundredth.
    assert pico.relative_error(streamed(model, cache, WRAPPED), expected) < 2e-4
    assert {name.partition(",")[0] for name in report()["paths"]} == {path}


@needs_kernels
def test_auto_compares_every_layout_of_bits_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled for the bits of a row, so what one layout shows says nothing about another."""
    monkeypatch.setattr(kernels_module, "left_to_torch", lambda shape: None)
    model = student(layers=1)
    kernels = model.set_kernels("auto")
    for cache in (MIXED, ((8, 8), (14, 4))):
        streamed(model, cache, 2)
    assert {shape.cache for _, shape, *_ in kernels.found.checked} == {
        f"MixedLatentCache, torch.int8, {RowBits(eight, 14 - eight, 0)}" for eight in (6, 8)
    }
    assert not any("torch" in name for name in kernels.report()["paths"])


@needs_kernels
def test_kernels_do_not_read_the_own_chunk_in_four_bits() -> None:
    model = student(own_chunk="latent")
    model.set_kernels("triton")
    with pytest.raises(UserError, match="would read the own chunk quantized, from a cache in fewer bits"):
        streamed(model, MIXED)


@pytest.mark.parametrize("bits", [RowBits(24, 64, 0), RowBits(1, 14, 6), RowBits(0, 40, 0), RowBits(70, 38, 66)])
def test_the_format_of_the_kernels(bits: RowBits) -> None:
    """To the bit, so torch may write what kernels read, as it does for a latent that layers share."""
    ring = MixedLatentCache(pico.dense_model().causal, [bits], 2, 2, 3, "cpu")
    rows = torch.randn(2, 6, bits.scalars) * torch.logspace(-9, 8, 6).view(-1, 1)
    rows[0, 2] = 0
    ring.put(ring.kept(0), ring.slots([1]), rows)
    latents = bits.eight + bits.four
    steps, scales = mla_attention.quantize_rows(rows, bits.eight, latents)
    assert torch.equal(ring.rows[0][:, 1], steps) and torch.equal(ring.scales[0][:, 1], scales)
    back = mla_attention.dequantize_rows(steps, scales, torch.float32, bits.eight, latents)
    assert torch.equal(ring.take(ring.kept(0), ring.slots([1])), back)


def test_models_without_latents_in_a_ring_refuse() -> None:
    dense = pico.dense_model(family="anyflow_far", causal=None)
    far = pico.convert(dense, init="random", kv_lora_rank=8)
    for model, why in ((pico.dense_model(), "is dense"), (far, "has no latents in a ring")):
        for cache in ("int8", MIXED):
            with pytest.raises(UserError, match=f"{type(model).__name__} {why}.* at auto$"):
                StreamingConfig(cache=cache).apply(model)
        with pytest.raises(ValueError, match=f"{type(model).__name__} has no cache in int8"):
            model.init_cache(1, 8, 8, dtype=torch.int8)
        StreamingConfig(cache="int8").dense.apply(model)
        assert model.cache_bits == "auto"


def test_a_recipe_of_such_a_model_is_refused_before_it_runs(tmp_path: Path) -> None:
    pico.dense_model(family="anyflow_far", causal=None).save_pretrained(tmp_path / "far")
    recipe = parse_recipe(RECIPE.format(teacher=tmp_path / "far"), ["streaming.cache=int8", "generate.prompts=[]"])
    with pytest.raises(UsageError, match=r"^streaming\.cache: MLAAnyFlowFAR.* only in its own dtype; set auto$"):
        check_recipe(recipe)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ("int4", "cache"),
        ([[24, 8], [64, 3]], "8 or 4 bits, such as"),
        ([[0, 8], [64, 4]], "give pairs of a number of latents"),
        ([], "give pairs"),
        ([[24, 4], [64, 8]], "put the pairs of 8 bits before those of 4"),
    ],
)
def test_bits_that_there_are_not(cache: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        validate(StreamingConfig, {"cache": cache})


def test_how_bits_are_written() -> None:
    for text in ("auto", "int8", "24x8,64x4", "64x4"):
        streaming = validate(StreamingConfig, {"cache": parse_bits(text)})
        assert format_bits(streaming.cache) == text
        assert validate(StreamingConfig, json.loads(streaming.model_dump_json())) == streaming
    with pytest.raises(ValueError, match="'24' is no cache format; write auto, int8 or LATENTSxBITS"):
        parse_bits("24")
    with pytest.raises(ValueError, match="matter most"):
        check_bits(((1, 4), (1, 8)))


def test_a_plan_counts_bits(capsys: pytest.CaptureFixture[str]) -> None:
    geometry = preset("wan2.1-t2v-1.3b").geometry
    tokens = 21 * 1560
    whole, eight, mixed = (plan(geometry, 96, 32, cache=cache) for cache in ("auto", "int8", ((32, 8), (64, 4))))
    assert whole.latent_cache_bytes == tokens * 30 * 128 * 2
    assert eight.latent_cache_bytes == tokens * 30 * (128 + 4)
    assert mixed.latent_cache_bytes == tokens * 30 * (32 + 32 + 32 + 2 * (1 + 2 + 1))
    assert whole.reduction == eight.reduction and mixed.max_streams_latent > eight.max_streams_latent
    assert main(["plan", "--preset", "wan2.1-t2v-1.3b", "--cache", "32x8,64x4", "--kv-lora-rank", "96", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["latent_cache_bytes"] == mixed.latent_cache_bytes and found["cache"] == "32x8,64x4"
    assert main(["plan", "--preset", "wan2.1-t2v-1.3b", "--cache", "32"]) == 2
    assert "error: --cache: '32' is no cache" in capsys.readouterr().err


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted digits model whose recipe streams with latents in 8 and 4 bits."""
    folder = tmp_path_factory.mktemp("digits")
    dense = load_checkpoint(write_teacher(folder / "teacher"))
    clips = [batch._replace(latents=torch.randn(4, 1, 8, 16, 16)) for batch in pico.batches()]
    clips = [batch._replace(encoder_hidden_states=torch.randn(4, 1, dense.config.text_dim)) for batch in clips]
    config = ConvertConfig(kv_lora_rank=12, calibration=pico.calibration())
    recipe = {
        "data": {"kind": "digits"},
        "generate": {"num_inference_steps": 1, "num_frames": 8},
        "streaming": {"cache": [[4, 8], [8, 4]]},
    }
    model = convert_model(FAMILY, dense, config, clips)
    save_checkpoint(model, folder / "checkpoint", {"source": {"model": "zoo:digits"}, "recipe": recipe})
    return folder / "checkpoint"


def test_generate_streams_as_the_recipe_says_and_flags_go_before(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    def made(name: str, *options: str) -> tuple[torch.Tensor, dict[str, Any]]:
        out = tmp_path / f"{name}.safetensors"
        told = ["generate", str(checkpoint), "--prompt", "7 at 2,1 moving up-left", "-o", str(out), "--json", *options]
        assert main(told) == 0
        return load_file(out)["latents"], json.loads(capsys.readouterr().out)

    mixed, result = made("recipe")
    assert result["cache"] == "4x8,8x4"
    whole, result = made("auto", "--cache", "auto")
    assert result["cache"] == "auto" and not torch.equal(mixed, whole)
    assert torch.equal(made("same", "--cache", "4x8,8x4")[0], mixed)
    eight = made("eight", "--cache", "int8")[0]
    assert 0 < pico.relative_error(eight, whole) < pico.relative_error(mixed, whole)
    refused = ["generate", str(checkpoint), "--prompt", "7", "-o", str(tmp_path / "x.mp4"), "--cache", "8x4,4x8"]
    assert main(refused) == 2
    assert "error: --cache: the first latents matter most" in capsys.readouterr().err


def test_an_export_remembers_it_and_a_pipeline_streams_so(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "out", ExportConfig(dtype="float32"))
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["streaming"]["cache"] == [[4, 8], [8, 4]]
    pipe = StreamingMLAPipeline.from_pretrained(tmp_path / "out")
    assert pipe.transformer.cache_bits == ((4, 8), (8, 4))
    assert isinstance(pipe.transformer.init_cache(1, 16, 16), MixedLatentCache)
    pipe = StreamingMLAPipeline.from_pretrained(tmp_path / "out", streaming={"cache": "int8"})
    assert isinstance(pipe.transformer.init_cache(1, 16, 16), Int8LatentCache)
