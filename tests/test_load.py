"""Sources are found, recognized and checked from their headers, and every bad one gives one clear line."""

from __future__ import annotations

import json
import logging
import shutil

import diffusers
import pytest
import torch
from checkpoint_case import CAUSAL, pico_dense, pico_mla, pico_velocity
from load_case import change_config, change_tensors, equal_tensors, refusal, stock_folder, write_shards
from safetensors.torch import load_file, save_file

from mla_convert import registry
from mla_convert.errors import UserError
from mla_convert.families import wan_files
from mla_convert.load import LazyTensors, load_dense, load_source
from mla_convert.load.weights import INDEX, WEIGHTS


@pytest.fixture
def folder(tmp_path):
    return stock_folder(tmp_path / "model")


def test_folder(folder):
    source = load_source(str(folder))

    assert source.family.name == "wan"
    assert source.folder == folder
    assert (source.geometry.num_layers, source.geometry.num_heads, source.geometry.head_dim) == (2, 2, 12)
    assert source.geometry.dense_scalars_per_token == 48
    assert not any(key.startswith("_") for key in source.config)
    assert equal_tensors(source.tensors, load_file(folder / WEIGHTS))


def test_pipeline_folder_and_its_license(folder, tmp_path):
    shutil.move(folder, tmp_path / "pipeline" / "transformer")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    (tmp_path / "pipeline" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")

    source = load_source(str(tmp_path / "pipeline"))

    assert source.folder == tmp_path / "pipeline" / "transformer"
    assert source.license == "apache-2.0"
    assert load_source(str(tmp_path / "pipeline"), subfolder="transformer").folder == source.folder
    assert "has no folder transformer_2" in refusal(tmp_path / "pipeline", subfolder="transformer_2")


def test_sharded_folder(folder, tmp_path):
    whole = load_file(folder / WEIGHTS)
    diffusers.WanTransformer3DModel.from_pretrained(folder).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2

    source = load_source(str(tmp_path / "sharded"))

    assert equal_tensors(source.tensors, whole)
    shard = source.tensors.files()[1]
    shard.unlink()
    assert refusal(tmp_path / "sharded") == f"{shard} is missing"


def test_index_that_lists_more_than_there_is(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"absent.weight": WEIGHTS}}))
    assert (
        refusal(folder)
        == f"{folder / INDEX} lists absent.weight, but {WEIGHTS} does not contain it; download both again"
    )


@pytest.mark.parametrize("weight_map", [None, ["a"], {"a": "../other.safetensors"}, {"a": 3}])
def test_index_without_a_usable_map(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert refusal(folder) == f"{folder / INDEX} has no valid weight_map"


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("configured", [True, False])
def test_shards_under_other_names(folder, monkeypatch, index, configured):
    """By folder, by the path of the index and by file; without a configuration, shapes determine the architecture."""
    whole = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    write_shards(folder, index, whole)
    if not configured:
        monkeypatch.setitem(wan_files.PUBLISHED_HEADS, 24, 2)
        (folder / "config.json").unlink()
    for source in (
        load_source(str(folder)),
        load_source(str(folder / index)),
        load_source(str(folder), file=index),
        load_source(str(folder.parent), file=f"{folder.name}/{index}"),
        load_source(str(folder.parent), subfolder=folder.name),
    ):
        assert equal_tensors(source.tensors, whole)
        assert source.geometry.num_heads == 2
        assert len(source.tensors.files()) == 2
    assert source.provenance()["file"] is None


def test_an_index_without_a_configuration_needs_a_published_size(folder):
    index = "model.safetensors.index.json"
    write_shards(folder.parent / "alone", index, load_file(folder / WEIGHTS))
    message = refusal(folder.parent / "alone")
    assert message.startswith(f"{folder.parent / 'alone' / index}: the number of heads of a Wan model")


def test_shards_of_a_training_checkpoint(folder):
    """States and wrappers are found in shards as well as in a single file."""
    whole = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    wrapped = {f"generator_ema.model.{name}": tensor for name, tensor in whole.items()}
    write_shards(folder, "model.safetensors.index.json", wrapped | {"generator.model.proj_out.bias": torch.zeros(16)})
    source = load_source(str(folder))
    assert source.state == "generator_ema"
    assert equal_tensors(source.tensors, whole)


def test_several_indexes_are_named(folder):
    whole = load_file(folder / WEIGHTS)
    for name in ("a", "b"):
        write_shards(folder, f"{name}.safetensors.index.json", whole)
    # Weights of a known name come first.
    assert load_source(str(folder)).tensors.files() == [folder / WEIGHTS]
    (folder / WEIGHTS).unlink()
    message = f"{folder} has 2 indexes of weights, a.safetensors.index.json, b.safetensors.index.json; "
    message += "name the one to read with file"
    assert refusal(folder) == message
    source = load_source(str(folder), file="b.safetensors.index.json")
    assert {file.name[0] for file in source.tensors.files()} == {"b"}
    (folder / "config.json").unlink()
    assert refusal(folder) == message


def test_what_is_no_index(folder):
    (folder / "other.index.json").write_text("{}")
    assert refusal(folder, file="other.index.json") == f"{folder / 'other.index.json'} has no valid weight_map"
    assert "is not a weights file" in refusal(folder, file="config.json")
    assert "does not exist; give a folder" in refusal("runs/model.safetensors.index.json")
    shards = write_shards(folder, "m.safetensors.index.json", load_file(folder / WEIGHTS))
    (folder / shards[1]).unlink()
    assert refusal(folder, file="m.safetensors.index.json") == f"{folder / shards[1]} is missing"


def test_single_file_with_its_config(folder):
    file = folder.joinpath(WEIGHTS).rename(folder / "teacher.safetensors")
    assert load_source(str(file)).geometry.num_heads == 2


def test_single_file_without_a_config_needs_a_published_size(folder, tmp_path):
    shutil.copy(folder / WEIGHTS, tmp_path / "alone.safetensors")
    message = refusal(tmp_path / "alone.safetensors")
    assert "number of heads of a Wan model with hidden size 24" in message
    assert message.endswith("put the model's config.json beside the file")


def test_loaded_model_is_the_stock_one(folder):
    source = load_source(str(folder), causal=CAUSAL)
    model = load_dense(source)
    stock = diffusers.WanTransformer3DModel.from_pretrained(folder)

    assert not model.training
    assert model.causal.window_frames == CAUSAL["window_frames"]
    assert equal_tensors(model.state_dict(), stock.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), stock.buffers(), strict=True))


def test_loading_in_bfloat16_keeps_what_from_pretrained_keeps(folder):
    model = load_dense(load_source(str(folder)), torch.bfloat16)
    theirs = type(model).from_pretrained(folder, dtype=torch.bfloat16, disable_mmap=True)

    assert model.dtype == torch.bfloat16
    dtypes = {name: tensor.dtype for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == dtypes
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
    assert torch.equal(pico_velocity(model), pico_velocity(theirs))


def test_loaded_weights_are_not_the_file(folder):
    model = load_dense(load_source(str(folder)))
    before = pico_velocity(model)
    change_tensors(folder, lambda tensors: tensors.update({name: 0 * tensor for name, tensor in tensors.items()}))
    assert torch.equal(pico_velocity(model), before)


def test_causal_section_of_the_source_unless_the_caller_gives_one(tmp_path):
    pico_dense().save_pretrained(tmp_path)
    assert load_source(str(tmp_path)).config["causal"] == CAUSAL
    wider = CAUSAL | {"window_frames": 8}
    assert load_source(str(tmp_path), causal=wider).config["causal"] == wider


def test_tensors_are_read_when_they_are_asked_for(folder, monkeypatch):
    read = []
    original = LazyTensors.__getitem__
    monkeypatch.setattr(LazyTensors, "__getitem__", lambda self, name: read.append(name) or original(self, name))

    source = load_source(str(folder))

    assert read == []
    assert source.tensors["proj_out.bias"].shape == source.tensors.shape("proj_out.bias") == (16,)
    assert source.tensors.dtype("proj_out.bias") == torch.float32
    assert read == ["proj_out.bias"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_the_weights(folder, value):
    change_tensors(folder, lambda tensors: tensors["blocks.1.attn1.to_k.weight"].view(-1)[5:7].fill_(value))
    expected = "tensor blocks.1.attn1.to_k.weight has 2 NaN or infinite values out of 576"
    with pytest.raises(UserError, match=expected):
        load_dense(load_source(str(folder)))


def test_missing_weights(folder):
    (folder / WEIGHTS).unlink()
    assert refusal(folder).startswith(f"{folder / WEIGHTS} is missing; if the weights have another name")
    (folder / "model.Q8_0.gguf").touch()
    assert "has only GGUF weights, which are quantized" in refusal(folder)


def test_several_weight_files(folder):
    for name in ("a", "b"):
        shutil.copy(folder / WEIGHTS, folder / f"{name}.safetensors")
    (folder / WEIGHTS).unlink()
    assert "has 2 .safetensors files" in refusal(folder)
    (folder / "b.safetensors").unlink()
    assert len(load_source(str(folder)).tensors) > 0


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_safetensors(folder, keep):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    message = refusal(folder)
    assert message.startswith(f"{folder / WEIGHTS} is truncated or not a safetensors file")
    assert message.endswith("download it again")


def test_git_lfs_pointer(folder):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "is a git-lfs pointer" in refusal(folder)


def test_tensor_of_the_wrong_shape(folder):
    change_tensors(folder, lambda tensors: tensors.update({"proj_out.bias": torch.zeros(3)}))
    message = refusal(folder)
    assert message == f"{folder}: tensor proj_out.bias has shape [3], but its configuration expects [16]"


def test_missing_and_unknown_tensors(folder):
    change_tensors(folder, lambda tensors: tensors.update({"extra.a": torch.zeros(1), "extra.b": torch.zeros(1)}))
    assert refusal(folder) == f"{folder} has the unknown tensors extra.a, extra.b; it does not fit its configuration"
    change_tensors(folder, lambda tensors: [tensors.pop(n) for n in ("extra.a", "extra.b", "proj_out.bias")])
    assert refusal(folder) == f"{folder} lacks tensor proj_out.bias; it does not fit its configuration"
    change_config(folder, num_layers=3)
    message = refusal(folder)
    assert f"{folder} lacks tensors blocks.2.scale_shift_table, " in message
    assert message.endswith(" and 25 more; it does not fit its configuration")


def test_tensors_that_the_stock_class_ignores(folder):
    name = "blocks.0.attn2.norm_added_q.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(1)}))
    assert name not in load_source(str(folder)).tensors


def test_lora_weights(folder):
    name = "transformer.blocks.0.attn1.to_q.lora_A.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(1)}))
    assert f"holds LoRA weights ({name}), which are half of a model; name the base model" in refusal(folder)


def test_quantized_weights(folder):
    def quantize(tensors):
        tensors["proj_out.weight"] = tensors["proj_out.weight"].to(torch.float8_e4m3fn)

    change_tensors(folder, quantize)
    assert "tensor proj_out.weight is stored as F8_E4M3, and quantized" in refusal(folder)
    change_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert "the weights are quantized (bitsandbytes)" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("WanVACETransformer3DModel", "its control blocks are not part of the causal model"),
        ("WanAnimateTransformer3DModel", "its motion encoder and face adapter are not"),
        ("WanModel_S2V", "its audio layers are not"),
        ("UNet2DConditionModel", "its class is UNet2DConditionModel"),
        (None, "its class is None"),
    ],
)
def test_unsupported_class_lists_the_supported(folder, name, reason):
    change_config(folder, _class_name=name)
    message = refusal(folder)
    assert reason in message
    assert message.endswith("WanTransformer3DModel, CausalWanTransformer3DModel, WanModel, CausalWanModel")


def test_tensors_of_an_unsupported_family(tmp_path):
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "unet.safetensors")
    message = refusal(tmp_path / "unet.safetensors")
    assert "its tensors (conv_in.weight, ...) are of no supported model" in message
    assert message.endswith("put its config.json beside the file")


def test_converted_model_is_no_source(tmp_path):
    pico_mla().save_pretrained(tmp_path)
    assert "already converted (MLAWanTransformer3DModel); start from the dense model" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "is not valid JSON"), ("[]", "does not hold a JSON object"), ("\xff", "is not valid JSON")],
)
def test_unreadable_config(folder, text, reason):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert f"{folder / 'config.json'} {reason}" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_layers": "two"}, "its configuration does not describe a CausalWanTransformer3DModel"),
        ({"patch_size": [2, 4, 4]}, "temporal patches of 2 frames are not supported"),
        ({"attention_head_dim": 13}, "does not describe"),
        ({"causal": {"window_frames": 1}}, "window_frames=1 cannot hold sink_frames=0"),
        ({"causal": {"windows": 1}}, "windows: Extra inputs are not permitted"),
    ],
)
def test_config_that_describes_no_model(folder, changes, reason):
    change_config(folder, **changes)
    assert reason in refusal(folder)


def test_unknown_config_keys_are_named(folder, caplog):
    change_config(folder, sparse_attention=True, add_img_emb=None)
    with caplog.at_level(logging.WARNING, "mla_convert"):
        assert "sparse_attention" not in load_source(str(folder)).config
    (record,) = caplog.records
    assert record.getMessage().endswith("ignores the unknown configuration keys sparse_attention")


def test_what_is_no_model(tmp_path):
    assert "neither config.json nor transformer/config.json" in refusal(tmp_path)
    assert "there is no model zoo:letters in this package" in refusal("zoo:letters")
    hint = "give a folder, a weights file, a Hub ID or zoo:NAME"
    for name in ("nothing", "/no/such/folder", str(tmp_path / "missing.safetensors"), "a/b/c", "runs/x.pt"):
        assert refusal(name) == f"{name} does not exist; {hint}"
    (tmp_path / "a" / "b").mkdir(parents=True)
    for place in ("a/b/model.pt", "a/model.safetensors", "a/notes.txt"):
        (tmp_path / place).touch()
    assert refusal(tmp_path).endswith("weights with file (--file), one of a/model.safetensors, a/b/model.pt")
    (tmp_path / "model.onnx").touch()
    assert "is not a weights file; use one of .safetensors, .pt" in refusal(tmp_path / "model.onnx")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable folder of modules; `package(name=text)` writes it and returns its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(**modules: str) -> str:
        name = f"plugins_{tmp_path.name.replace('-', '_')}"
        (tmp_path / name).mkdir()
        for module, text in {"__init__": "", **modules}.items():
            (tmp_path / name / f"{module}.py").write_text(text)
        return name

    return write


ITEM = "import types\nITEM = types.SimpleNamespace(name={!r})\n"


def test_registry_collects_by_name(package):
    name = package(one=ITEM.format("b"), two=ITEM.format("a"), helper="VALUE = 1\n")
    assert list(registry.collect(name, "ITEM")) == ["a", "b"]


def test_registry_refuses_duplicates(package):
    name = package(one=ITEM.format("same"), two=ITEM.format("same"))
    with pytest.raises(ValueError, match=rf"{name}\.one and {name}\.two both export a ITEM called 'same'"):
        registry.collect(name, "ITEM")


def test_registry_swallows_nothing(package):
    with pytest.raises(ZeroDivisionError):
        registry.collect(package(broken="1 / 0\n"), "ITEM")


def test_families_are_attributes_of_diffusers():
    for family in registry.families().values():
        for model_class in (family.dense_class, family.mla_class):
            assert getattr(diffusers, model_class.__name__) is model_class
