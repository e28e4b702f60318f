"""Conversion block by block: the same as the whole model, on disk and in memory, resumed or not."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from recipe_case import RECIPE, digests, write_teacher
from safetensors.torch import load_file

from mla_convert.convert import CalibrationBatch, ConvertConfig, convert_model, convert_source
from mla_convert.convert import calibrate as calibrate_module
from mla_convert.convert import layers as layers_module
from mla_convert.convert.blocks import ModelBlocks, SourceBlocks, with_attention
from mla_convert.convert.calibrate import sweep
from mla_convert.convert.clips import PROJECTION, drawn, enter_clips
from mla_convert.convert.config import CalibrationConfig
from mla_convert.convert.probe import LayerSample
from mla_convert.convert.store import TensorStore
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


def calibration(**settings: Any) -> dict[str, Any]:
    return {"clips": 8, "batch_size": 4, "queries_per_chunk": 4, **settings}


def config(**settings: Any) -> ConvertConfig:
    return ConvertConfig(**{"kv_lora_rank": 10, "calibration": calibration(), **settings})


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
    settings = config(calibration=calibration(**METHODS[method]))
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
    """The layers that were fitted, in order."""
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
    settings = config(init=init, calibration=calibration(**METHODS[method]))

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


def collect(dense: Any, layers: set[int], store: TensorStore | None = None, **settings: Any) -> dict[int, LayerSample]:
    """Samples of some layers of a dense model, by layer."""
    samples: dict[int, LayerSample] = {}

    def keep(layer: int, block: Any, sample: LayerSample | None) -> None:
        assert sample is not None
        samples[layer] = sample

    blocks, chosen = ModelBlocks(dense), CalibrationConfig(**calibration(**settings))
    clips = enter_clips(blocks, pico.batches(), chosen, store or TensorStore())
    sweep(blocks, clips, chosen, True, layers, keep)
    return samples


def equal(first: LayerSample, second: LayerSample) -> bool:
    return all(torch.equal(x, vars(second)[name]) for name, x in vars(first).items())


@pytest.mark.parametrize("metric", ["output", "velocity"])
def test_a_sample_does_not_depend_on_which_others_are_taken(metric: str) -> None:
    dense = pico.dense_model(layers=LAYERS)
    every = collect(dense, {0, 1, 2}, metric=metric)
    for layers in ({0}, {1, 2}, {2}):
        some = collect(dense, layers, metric=metric)
        assert some.keys() == layers
        assert all(equal(some[layer], every[layer]) for layer in layers)


@pytest.mark.parametrize("metric", ["output", "velocity"])
def test_hidden_states_on_disk_change_nothing(tmp_path: Path, metric: str) -> None:
    dense = pico.dense_model(layers=LAYERS)
    held = collect(dense, {0, 1, 2}, metric=metric)
    store = TensorStore(tmp_path / "activations", limit=0)
    spilled = collect(dense, {0, 1, 2}, store, metric=metric)
    assert all(equal(spilled[layer], held[layer]) for layer in held)
    store.clear()
    assert not (tmp_path / "activations").exists()


def test_hidden_states_that_fit_nowhere_are_refused_before_they_are_computed(tmp_path: Path) -> None:
    store = TensorStore(tmp_path / "activations", limit=0)
    with pytest.raises(UserError, match=r"keeps 1e\+09 GB of hidden states .* free; lower clips"):
        store.require(10**18, "lower clips")
    assert list(tmp_path.iterdir()) == []


def test_gradient_of_the_velocity_is_that_of_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block with weights that would want gradients, against autograd through the model."""
    dense = pico.dense_model(layers=LAYERS).requires_grad_()
    chosen = CalibrationConfig(**calibration())
    grads: dict[tuple[int, int], torch.Tensor] = {}
    numbers = itertools.count()

    def record(layer: Any, hidden: torch.Tensor, *rest: Any) -> Any:
        grads[layer.layer, next(numbers) % 2] = rest[-1]
        return original(layer, hidden, *rest)

    original = calibrate_module.sample_layer
    monkeypatch.setattr(calibrate_module, "sample_layer", record)
    collect(dense, {0, 1, 2})
    assert all(parameter.grad is None for parameter in dense.parameters())

    clips = enter_clips(ModelBlocks(dense), pico.batches(), chosen, TensorStore())
    for number, inputs in enumerate(clips.inputs):
        seen: list[torch.Tensor] = []
        hooks = [b.attn1.register_forward_hook(lambda _, args, out, s=seen: s.append(out)) for b in dense.blocks]
        tokens = clips.store[clips.key(0, number)]
        for block in dense.blocks:
            tokens = block(tokens, *inputs.shared)
        v = dense.leave(tokens, inputs)
        for hook in hooks:
            hook.remove()
        z = torch.randn(v.shape, generator=drawn(PROJECTION, chosen.seed, number))
        expected = torch.autograd.grad(v, seen, z / v.numel() ** 0.5)
        for layer, grad in enumerate(expected):
            # Observed 2.4e-7 of the largest.
            assert pico.relative_error(grads[layer, number], grad) < 2e-6


def test_expected_square_of_a_probe_is_the_mean_squared_velocity_error() -> None:
    """A random error of the attention output, weighed by many gradients, against what it does to the velocity."""
    dense = pico.dense_model()
    blocks, chosen = ModelBlocks(dense), CalibrationConfig(**calibration())
    inputs = enter_clips(blocks, pico.batches()[:1], chosen, store := TensorStore()).inputs[0]
    tokens = store["0000-00000"]
    error = 1e-3 * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0))

    def velocity(added: torch.Tensor) -> torch.Tensor:
        hook = dense.blocks[0].attn1.register_forward_hook(lambda _, args, out: out + added)
        x = tokens
        for block in dense.blocks:
            x = block(x, *inputs.shared)
        hook.remove()
        return dense.leave(x, inputs)

    with torch.no_grad():
        mean_squared = float((velocity(error) - velocity(torch.zeros_like(error))).square().mean())
    added = torch.zeros_like(error).requires_grad_()
    v = velocity(added)
    products = []
    for draw in range(200):
        z = torch.randn(v.shape, generator=drawn(PROJECTION, draw, 0)) * v.numel() ** -0.5
        (grad,) = torch.autograd.grad(v, added, z, retain_graph=True)
        products.append(float((grad * error).sum()) ** 2)
    assert sum(products) / len(products) == pytest.approx(mean_squared, rel=0.3)


def test_layers_see_what_the_converted_ones_below_made() -> None:
    dense = pico.dense_model(layers=LAYERS)
    states = {}
    for name, settings in (("teacher", {"metric": "output"}), ("converted", METHODS["converted"])):
        model = convert_model(
            FAMILY, dense, config(kv_lora_rank=4, calibration=calibration(**settings)), pico.batches()
        )
        assert torch.isfinite(model(*pico.inputs(2, 7, 6, 4)).sample).all()
        states[name] = model.state_dict()
    same = [
        torch.equal(states["teacher"][name], states["converted"][name])
        for name in (f"blocks.{layer}.attn1.kv_a_proj.weight" for layer in range(LAYERS))
    ]
    assert same == [True, False, False]


def test_converted_hidden_states_are_those_of_the_converted_model() -> None:
    """What enters layer 2 is what the converted model's layers 0 and 1 make of the same clips."""
    dense = pico.dense_model(layers=LAYERS)
    settings = config(kv_lora_rank=4, calibration=calibration(**METHODS["converted"]))
    model = convert_model(FAMILY, dense, settings, pico.batches())
    blocks = ModelBlocks(dense)
    entered: dict[int, torch.Tensor] = {}

    def visit(layer: int, block: Any, sample: LayerSample | None) -> Any:
        if layer == LAYERS - 1:
            entered[layer] = clips.store[clips.key(layer, 0)]
        return model.blocks[layer].attn1

    clips = enter_clips(blocks, pico.batches(), settings.calibration, TensorStore())
    tokens, inputs = clips.store[clips.key(0, 0)], clips.inputs[0]
    sweep(blocks, clips, settings.calibration, True, {LAYERS - 1}, visit)
    with torch.no_grad():
        for block in model.blocks[: LAYERS - 1]:
            tokens = block(tokens, *inputs.shared)
    assert torch.equal(entered[LAYERS - 1], tokens)


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
        convert_model(FAMILY, dense, config(calibration=calibration(**METHODS[method])), pico.batches())


@pytest.mark.parametrize("method", METHODS)
def test_fewer_tokens_than_the_rank_are_said_once(caplog: pytest.LogCaptureFixture, method: str) -> None:
    few = calibration(**METHODS[method], max_tokens=6)
    model = convert_model(FAMILY, pico.dense_model(), config(kv_lora_rank=20, calibration=few), pico.batches())
    assert torch.isfinite(model(*pico.inputs(2, 7, 6, 4)).sample).all()
    (message,) = caplog.messages
    assert "6 calibration tokens do not determine a latent of rank 20; use more calibration.clips" in message


@pytest.mark.parametrize("method", METHODS)
def test_layers_without_keys_convert(method: str) -> None:
    dense = pico.dense_model(layers=LAYERS)
    for part in (dense.blocks[1].attn1.to_k, dense.blocks[1].attn1.norm_k):
        for parameter in part.parameters():
            parameter.zero_()
    settings = config(kv_lora_rank=40, calibration=calibration(**METHODS[method]))
    model = convert_model(FAMILY, dense, settings, pico.batches())
    clip = pico.inputs(2, 7, 6, 4)
    assert pico.relative_error(model(*clip).sample, dense(*clip).sample) < 0.1


@pytest.fixture
def digits(tmp_path: Path) -> Any:
    """A recipe of digits that calibrates on rollouts."""
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
