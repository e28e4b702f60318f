"""Conversion block by block equals conversion of the whole model, on disk and in memory, resumed or not."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from recipe_case import RECIPE, digests, write_teacher
from safetensors.torch import load_file, save_file

from mla_convert.convert import CalibrationBatch, ConvertConfig, convert_model, convert_source
from mla_convert.convert import layers as layers_module
from mla_convert.convert.blocks import SourceBlocks, with_attention
from mla_convert.convert.config import CalibrationConfig
from mla_convert.errors import UsageError, UserError
from mla_convert.export.checkpoint import load_checkpoint, save_checkpoint
from mla_convert.families.wan import FAMILY
from mla_convert.load import Source, load_dense, load_source
from mla_convert.mla.window import CausalConfig
from mla_convert.pipeline import calibration as calibration_module
from mla_convert.pipeline import run
from mla_convert.pipeline.calibration import calibration_batches
from mla_convert.pipeline.context import Context
from mla_convert.recipe.load import parse_recipe

LAYERS = 3
METHODS: dict[str, dict[str, Any]] = {
    "output": {"metric": "output"},
    "velocity": {"metric": "velocity"},
    "converted": {"metric": "output", "hidden_states": "converted"},
}


def config(**settings: Any) -> ConvertConfig:
    return ConvertConfig(**{"kv_lora_rank": 10, "calibration": pico.calibration(), **settings})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A dense model of three layers in bfloat16, in several shards."""
    folder = tmp_path_factory.mktemp("dense")
    pico.dense_model(layers=LAYERS).to(torch.bfloat16).save_pretrained(folder, max_shard_size="10KB")
    return load_source(str(folder))


def identical(first: Path, second: Path) -> bool:
    return digests(first / "transformer") == digests(second / "transformer")


@pytest.mark.parametrize(("run", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
@pytest.mark.parametrize("context", [False, True])
def test_blocks_one_at_a_time_are_the_whole_forward(
    source: Source, context: bool, run: bool, dtype: torch.dtype
) -> None:
    latents, timestep, text = (x.to(dtype) for x in pico.inputs(2, 7, 6, 4))
    clean = {"context": 0.5 * latents} if context else {}
    blocks, dense = SourceBlocks(source, run=run), load_dense(source, dtype if run else None)
    with torch.no_grad():
        inputs = blocks.model.enter(latents, timestep, text, **clean)
        tokens = inputs.tokens
        for layer in range(len(blocks)):
            with blocks.open(layer) as block:
                tokens = block(tokens, *inputs.shared)
            assert {p.device.type for p in block.parameters()} == {"meta"}
        expected = dense(latents, timestep, text, **clean).sample
    assert blocks.model.dtype == dense.dtype
    assert torch.equal(blocks.model.leave(tokens, inputs), expected)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_streamed_conversion_is_the_same_bytes(
    source: Source, tmp_path: Path, method: str, dtype: torch.dtype | None
) -> None:
    settings = config(calibration=pico.calibration(**METHODS[method]))
    model = convert_model(FAMILY, load_dense(source, dtype), settings, pico.batches())
    save_checkpoint(model, tmp_path / "memory", {})
    converted = convert_source(source, settings, tmp_path / "work", pico.batches(), dtype=dtype)
    save_checkpoint(converted.model, tmp_path / "disk", {}, tensors=converted.tensors)
    assert digests(tmp_path / "disk") == digests(tmp_path / "memory")
    assert sorted(path.name for path in (tmp_path / "disk" / "transformer").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


@pytest.mark.parametrize("variant", pico.VARIANTS[::2], ids=lambda v: v["position"])
@pytest.mark.parametrize("init", ["random", "svd", "activation"])
def test_every_layout_streams(source: Source, tmp_path: Path, variant: dict[str, Any], init: str) -> None:
    settings = config(**variant, init=init, q_lora_rank=12)
    model = convert_model(FAMILY, load_dense(source), settings, pico.batches(), seed=3)
    converted = convert_source(source, settings, tmp_path / "work", pico.batches(), seed=3)
    save_checkpoint(converted.model, tmp_path / "disk", {}, tensors=converted.tensors)
    loaded = load_checkpoint(tmp_path / "disk", verify=True).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_shards_are_those_of_save_pretrained(source: Source, tmp_path: Path) -> None:
    converted = convert_source(source, config(init="svd"), tmp_path / "work")
    save_checkpoint(converted.model, tmp_path / "disk", {}, max_shard_size="20KB", tensors=converted.tensors)
    model = convert_model(FAMILY, load_dense(source), config(init="svd"))
    model.save_pretrained(tmp_path / "stock", max_shard_size="20KB")
    ours, theirs = digests(tmp_path / "disk" / "transformer"), digests(tmp_path / "stock")
    assert len(ours) > 4
    assert ours == theirs


class Killed(Exception):
    pass


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that are fitted, in order."""
    seen: list[int] = []
    original = layers_module.read_layer

    def counted(layer: Any, *arguments: Any) -> Any:
        seen.append(layer.layer)
        return original(layer, *arguments)

    monkeypatch.setattr(layers_module, "read_layer", counted)
    return seen


@pytest.mark.parametrize("init", ["svd", "random", "activation"])
@pytest.mark.parametrize("method", METHODS)
def test_killed_after_each_layer_ends_with_the_same_bytes(
    source: Source, tmp_path: Path, fitted: list[int], method: str, init: str
) -> None:
    settings = config(init=init, calibration=pico.calibration(**METHODS[method]))

    def convert(work: str, progress: Any = None) -> Path:
        converted = convert_source(source, settings, tmp_path / work, pico.batches(), progress=progress)
        save_checkpoint(converted.model, tmp_path / f"{work}-out", {}, tensors=converted.tensors)
        return tmp_path / f"{work}-out"

    whole = convert("whole")
    once = list(fitted)
    fitted.clear()

    def killed(what: str, done: int, total: int) -> None:
        if what == "convert":
            raise Killed

    for _ in range(LAYERS):
        with pytest.raises(Killed):
            convert("resumed", killed)
    assert identical(convert("resumed"), whole)
    assert fitted == once
    assert sorted(once) == list(range(LAYERS))


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"dtype": torch.float32}, {"identity": {"data": "other"}}, {"config": config(init="random")}],
)
def test_parts_of_another_conversion_are_not_used(
    source: Source, tmp_path: Path, fitted: list[int], change: dict[str, Any]
) -> None:
    arguments: dict[str, Any] = {"config": config(init="svd"), "work": tmp_path / "work"}
    convert_source(source, **arguments)
    convert_source(source, **arguments)
    assert len(fitted) == LAYERS
    convert_source(source, **{**arguments, **change})
    assert len(fitted) == 2 * LAYERS


def test_weights_alone_read_no_clips(source: Source, tmp_path: Path) -> None:
    def clips() -> Iterator[CalibrationBatch]:
        raise AssertionError("clips were read")
        yield

    for init in ("svd", "random"):
        convert_source(source, config(init=init), tmp_path / init, clips())


def test_no_clips_are_said_so(source: Source, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no clips to calibrate on"):
        convert_source(source, config(), tmp_path / "work", [])


def test_a_block_with_another_attention_leaves_the_first_alone() -> None:
    block = pico.dense_model().blocks[0]
    attention = block.attn1
    changed = with_attention(block, torch.nn.Identity())
    assert isinstance(changed.attn1, torch.nn.Identity)
    assert block.attn1 is attention
    assert changed.ffn is block.ffn


def test_converted_hidden_states_need_the_output_metric() -> None:
    with pytest.raises(ValueError, match="set metric to output"):
        CalibrationConfig(hidden_states="converted")


@pytest.mark.parametrize("method", METHODS)
def test_infinite_activations_name_the_layer(method: str) -> None:
    dense = pico.dense_model(layers=LAYERS)
    dense.blocks[1].attn1.to_k.bias.fill_(float("inf"))
    with pytest.raises(UserError, match="NaN or infinite values in the key of layer 1; check the weights"):
        convert_model(FAMILY, dense, config(calibration=pico.calibration(**METHODS[method])), pico.batches())


@pytest.mark.parametrize("method", METHODS)
def test_fewer_tokens_than_the_rank_are_said_once(caplog: pytest.LogCaptureFixture, method: str) -> None:
    few = pico.calibration(**METHODS[method], max_tokens=6)
    model = convert_model(FAMILY, pico.dense_model(), config(kv_lora_rank=20, calibration=few), pico.batches())
    assert torch.isfinite(model(*pico.inputs(2, 7, 6, 4)).sample).all()
    (message,) = (message for message in caplog.messages if "do not determine" in message)
    assert "6 calibration tokens do not determine a latent of rank 20; use more calibration.clips" in message


@pytest.mark.parametrize("method", METHODS)
def test_layers_without_keys_convert(method: str) -> None:
    dense = pico.dense_model(layers=LAYERS)
    for part in (dense.blocks[1].attn1.to_k, dense.blocks[1].attn1.norm_k):
        for parameter in part.parameters():
            parameter.zero_()
    settings = config(kv_lora_rank=40, calibration=pico.calibration(**METHODS[method]))
    model = convert_model(FAMILY, dense, settings, pico.batches())
    clip = pico.inputs(2, 7, 6, 4)
    assert pico.relative_error(model(*clip).sample, dense(*clip).sample) < 0.1


@pytest.fixture
def digits(tmp_path: Path) -> Any:
    """A digits recipe that calibrates on rollouts."""
    teacher = write_teacher(tmp_path / "teacher")
    return parse_recipe(RECIPE.format(teacher=teacher), ["convert.calibration.source=rollouts"])


def test_rollouts_have_the_size_of_the_data_and_are_made_once(
    digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = Context(digits, tmp_path / "run", lambda *told: None)
    first = list(calibration_batches(context, tmp_path / "work"))
    example = context.data.example(0)
    assert [batch.latents.shape for batch in first] == 2 * [(2, *example["latents"].shape)]
    assert torch.equal(first[0].encoder_hidden_states[0], example["encoder_hidden_states"])
    assert not torch.equal(first[0].latents[0], first[1].latents[0])
    monkeypatch.setattr(calibration_module, "rollout", None)
    again = list(calibration_batches(context, tmp_path / "work"))
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(first, again, strict=True))


def test_calibration_rollouts_begin_with_nothing_that_the_videos_begin_with(digits: Any, tmp_path: Path) -> None:
    save_file({"latents": torch.ones(1, 2, 16, 16)}, tmp_path / "a.safetensors")
    made = []
    for name, given in (("plain", {}), ("source", {"source": str(tmp_path / "a.safetensors"), "num_frames": None})):
        recipe = digits.model_copy(update={"generate": digits.generate.model_copy(update=given)})
        context = Context(recipe, tmp_path / name, lambda *_: None)
        made.append(next(iter(calibration_batches(context, tmp_path / f"{name}-work"))).latents)
    assert torch.equal(*made)


def test_run_that_calibrates_on_rollouts_leaves_a_checkpoint_alone(digits: Any, tmp_path: Path) -> None:
    run(digits, tmp_path / "run", until="convert")
    assert sorted(path.name for path in (tmp_path / "run" / "stages").iterdir()) == ["00-convert"]
    assert load_checkpoint(tmp_path / "run" / "stages" / "00-convert").mla.kv_lora_rank == (8, 8)


def test_weights_alone_convert_where_the_data_is_not(tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "teacher")
    elsewhere = ["data.kind=latents", f"data.folder={tmp_path / 'nowhere'}"]
    recipe = parse_recipe(RECIPE.format(teacher=teacher), [*elsewhere, "convert.init=svd"])
    run(recipe, tmp_path / "run", until="convert")
    assert load_checkpoint(tmp_path / "run" / "stages" / "00-convert").mla.kv_lora_rank == (8, 8)
    for name, until, changes in (("measured", None, ["convert.init=svd"]), ("fitted", "convert", [])):
        recipe = parse_recipe(RECIPE.format(teacher=teacher), [*elsewhere, *changes])
        with pytest.raises(UserError, match=r"no \.parquet shards in"):
            run(recipe, tmp_path / name, until=until)
        assert not (tmp_path / name / "stages").exists()


def test_rollouts_need_a_window(digits: Any, tmp_path: Path) -> None:
    unbounded = digits.model_copy(update={"causal": CausalConfig(window_frames=None)})
    with pytest.raises(UsageError, match=r"rollouts needs a finite window; set causal\.window_frames"):
        list(calibration_batches(Context(unbounded, tmp_path / "run", lambda *told: None), tmp_path))


def test_checkpoints_of_the_benchmark_load_and_convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "docs" / "benchmarks"))
    wan_shapes = importlib.import_module("wan_shapes")
    small = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 24, "text_dim": 8, "freq_dim": 16}
    parameters = wan_shapes.write_checkpoint(tmp_path / "whole", "1.3b", 3, "20KB", **small)
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) == 3
    fewer = wan_shapes.cut_checkpoint(tmp_path / "whole", tmp_path / "cut", 2)
    whole, cut = (load_source(str(tmp_path / name)) for name in ("whole", "cut"))
    assert (whole.geometry.num_layers, cut.geometry.num_layers) == (3, 2)
    assert [sum(cut.tensors[n].numel() for n in cut.tensors), fewer < parameters] == [fewer, True]
    assert {whole.tensors.dtype(name) for name in whole.tensors} == {torch.bfloat16}
    assert whole.tensors["blocks.2.attn1.norm_k.weight"].eq(1).all()
    assert whole.tensors["blocks.2.attn1.to_k.weight"].float().std() == pytest.approx(0.02, rel=0.1)
    converted = convert_source(cut, config(init="svd"), tmp_path / "work", dtype=torch.bfloat16)
    assert converted.model.mla.kv_lora_rank == (10, 10)


def test_mixed_dtypes_of_a_source_are_kept(tmp_path: Path) -> None:
    dense = pico.dense_model().to(torch.bfloat16)
    dense.blocks[0].norm2.float()
    dense.scale_shift_table.data = dense.scale_shift_table.data.float()
    dense.save_pretrained(tmp_path / "dense")
    converted = convert_source(load_source(str(tmp_path / "dense")), config(), tmp_path / "work", pico.batches())
    save_checkpoint(converted.model, tmp_path / "out", {}, tensors=converted.tensors)
    stored = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert stored["blocks.0.norm2.weight"].dtype == stored["scale_shift_table"].dtype == torch.float32
    assert stored["blocks.1.norm2.weight"].dtype == stored["blocks.0.attn1.kv_a_proj.weight"].dtype == torch.bfloat16
