"""Checkpoints as published by the Wan repository and its descendants: read exactly, or refused by name."""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from checkpoint_case import CAUSAL, STOCK, pico_dense, pico_velocity
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file

from mla_convert.errors import UserError
from mla_convert.export.checkpoint import load_checkpoint
from mla_convert.families import wan_files
from mla_convert.families.wan_files import original_names, stored_names
from mla_convert.load import AdapterConfig, LazyTensors, load_dense, load_source, locate
from mla_convert.load.states import find_state
from mla_convert.pipeline.experts import read_model_config
from mla_convert.recipe.schema import SourceConfig

T2V = {"in_channels": 1}
I2V = {"in_channels": 6, "image_dim": 8, "added_kv_proj_dim": 24, "pos_embed_seq_len": 4}
ORIGINAL = {
    "_class_name": "CausalWanModel",
    "_diffusers_version": "0.30.0",
    "dim": 24,
    "eps": 1e-6,
    "ffn_dim": 32,
    "freq_dim": 16,
    "in_dim": 1,
    "model_type": "t2v",
    "num_heads": 2,
    "num_layers": 2,
    "out_dim": 1,
    "text_len": 512,
}


@pytest.fixture(autouse=True)
def known_size(monkeypatch):
    """Treat the tiny models' hidden size as one whose number of heads is known."""
    monkeypatch.setitem(wan_files.PUBLISHED_HEADS, 24, 2)


@pytest.fixture(scope="module")
def model():
    return pico_dense()


@pytest.fixture
def original(model):
    """The model's tensors under the Wan repository's names."""
    return in_wan_names(model.state_dict())


def in_wan_names(state: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    return {f"{prefix}{theirs}": state[ours].clone() for theirs, ours in original_names(state).items()}


def refusal(model: Any, **arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_source(str(model), **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(tensors: Any, state: dict[str, torch.Tensor]) -> bool:
    return sorted(tensors) == sorted(state) and all(torch.equal(tensors[name], state[name]) for name in state)


@pytest.mark.parametrize("sizes", [T2V, I2V], ids=["t2v", "i2v"])
def test_names_go_there_and_back(sizes):
    state = diffusers.WanTransformer3DModel(**{**STOCK, **sizes}).state_dict()

    theirs = in_wan_names(state)
    back = {ours: theirs[name] for ours, name in stored_names(theirs).items()}

    assert len(theirs) == len(state)
    assert {ours for name, ours in original_names(state).items() if name == ours} == {
        "patch_embedding.weight",
        "patch_embedding.bias",
    }
    assert list(original_names(back)) == list(theirs)
    assert same(back, state)


def test_names_are_those_that_diffusers_knows():
    # Diffusers' own converter leaves the place embedding of first-and-last-frame models out.
    state = diffusers.WanTransformer3DModel(**{**STOCK, **I2V, "pos_embed_seq_len": None}).state_dict()
    assert same(convert_wan_transformer_to_diffusers(in_wan_names(state)), state)


def published(state: dict[str, torch.Tensor], form: str) -> dict[str, Any]:
    """A checkpoint in one of the forms that research repositories publish."""
    bare = in_wan_names(state)
    other = {f"model.{name}": tensor + 1 for name, tensor in bare.items()}
    blocks = [re.sub(r"^(blocks\.\d+)\.", r"\1._checkpoint_wrapped_module.", name) for name in bare]
    wrapped = dict(zip(blocks, bare.values(), strict=True))
    return {
        "wan": bare,
        "comfyui": {f"model.diffusion_model.{name}": tensor for name, tensor in bare.items()},
        "causvid": {"generator": in_wan_names(state, "model.")},
        "self_forcing": {"generator": other, "critic": other, "generator_ema": in_wan_names(state, "model.")},
        "causal_forcing": {"generator_ema": in_wan_names(state, "model._fsdp_wrapped_module.")},
        "longlive": {"model": in_wan_names(state), "step": 3, "config": {"lr": 1e-5}},
        "lightning": {"state_dict": in_wan_names(state, "model."), "optimizer": {"state": {0: {"exp_avg": other}}}},
        "compiled": {f"module._orig_mod.model.{name}": tensor for name, tensor in wrapped.items()},
        "diffusers": {"generator": {f"model.{name}": tensor for name, tensor in state.items()}},
    }[form]


def test_modules_that_are_named_like_a_wrapper_keep_their_name():
    """A trainer's names stand before the model's; FSDP's, for one, may stand anywhere."""
    names = ["module.model._orig_mod.blocks.0._fsdp_wrapped_module.model.weight", "module.model.blocks.0.weight"]
    assert list(find_state(names, None, "a file").names) == ["blocks.0.model.weight", "blocks.0.weight"]


@pytest.mark.parametrize("form", ["causvid", "self_forcing", "causal_forcing", "longlive", "lightning", "diffusers"])
@pytest.mark.parametrize("suffix", ["pt", "ckpt"])
def test_published_checkpoint_is_the_model(tmp_path, model, form, suffix):
    torch.save(published(model.state_dict(), form), tmp_path / f"model.{suffix}")
    read = load_dense(load_source(str(tmp_path), file=f"model.{suffix}", causal=CAUSAL))
    assert same(read.state_dict(), model.state_dict())
    assert torch.equal(pico_velocity(read), pico_velocity(model))


@pytest.mark.parametrize("form", ["wan", "comfyui", "compiled"])
@pytest.mark.parametrize("suffix", ["safetensors", "pth", "bin"])
def test_bare_state_is_the_model(tmp_path, model, form, suffix):
    path = tmp_path / f"model.{suffix}"
    state = published(model.state_dict(), form)
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    read = load_dense(load_source(str(path), causal=CAUSAL))
    assert same(read.state_dict(), model.state_dict())
    assert torch.equal(pico_velocity(read), pico_velocity(model))


def test_image_to_video_checkpoint(tmp_path):
    model = pico_dense(**I2V)
    torch.save({"generator": in_wan_names(model.state_dict(), "model.")}, tmp_path / "i2v.pt")
    source = load_source(str(tmp_path / "i2v.pt"), causal=CAUSAL)
    assert same(load_dense(source).state_dict(), model.state_dict())
    assert {key: source.config[key] for key in I2V} == I2V


def test_averaged_weights_are_chosen(tmp_path, model):
    state = model.state_dict()
    path = tmp_path / "both.pt"
    torch.save(published(state, "self_forcing"), path)
    assert load_source(str(path)).provenance()["state"] == "generator_ema"
    assert same(load_source(str(path), use_ema=True).tensors, state)
    trained = load_source(str(path), use_ema=False)
    assert same(trained.tensors, {name: tensor + 1 for name, tensor in state.items()})
    assert trained.state == "generator"


def test_averaged_weights_that_are_not_there(tmp_path, model):
    path = tmp_path / "one.pt"
    torch.save(published(model.state_dict(), "causvid") | {"critic": {"a": torch.zeros(1)}}, path)
    assert refusal(path, use_ema=True) == (
        f"{path} holds no averaged weights (generator_ema), but only generator, critic; leave source.use_ema out"
    )
    torch.save(published(model.state_dict(), "causal_forcing"), path)
    assert "holds only averaged weights (generator_ema)" in refusal(path, use_ema=False)
    torch.save(published(model.state_dict(), "wan"), path)
    assert "only one set of weights" in refusal(path, use_ema=True)


def folder_of(path: Path, state: dict[str, torch.Tensor], **changes: Any) -> Path:
    """A folder in the Wan repository's layout."""
    path.mkdir(exist_ok=True)
    save_file(state, path / "diffusion_pytorch_model.safetensors")
    (path / "config.json").write_text(json.dumps(ORIGINAL | changes))
    return path


@pytest.mark.parametrize("kind", ["WanModel", "CausalWanModel"])
def test_folder_of_the_wan_repository(tmp_path, model, original, kind):
    source = load_source(str(folder_of(tmp_path / "wan", original, _class_name=kind, eps=1e-5)))
    expected = {key: list(value) if isinstance(value, tuple) else value for key, value in STOCK.items()}
    assert source.config.items() >= {**expected, "eps": 1e-5}.items()
    assert "causal" not in source.config
    assert same(load_dense(source).state_dict(), model.state_dict())


@pytest.mark.parametrize(("suffix", "save"), [("safetensors", save_file), ("bin", torch.save)])
def test_sharded_folder_of_the_wan_repository(tmp_path, model, original, suffix, save):
    names = sorted(original)
    folder = folder_of(tmp_path / "wan", {})
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    weight_map = {name: f"part-{index % 3}.{suffix}" for index, name in enumerate(names)}
    for file in set(weight_map.values()):
        save({name: original[name] for name in names if weight_map[name] == file}, folder / file)
    index = folder / f"diffusion_pytorch_model.{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert same(load_source(str(folder)).tensors, model.state_dict())


def test_chunks_and_window_of_the_configuration(tmp_path, original):
    folder = folder_of(tmp_path / "wan", original, num_frame_per_block=1, local_attn_size=12, sink_size=3)
    theirs = {"num_frames_per_block": 1, "window_frames": 12, "sink_frames": 3, "sink_positions": "absolute"}
    assert load_source(str(folder)).config["causal"] == theirs
    assert load_source(str(folder), causal=CAUSAL).config["causal"] == CAUSAL
    folder_of(folder, original, local_attn_size=-1, sink_size=0)
    assert load_source(str(folder)).config["causal"] == {"window_frames": 21, "sink_frames": 0}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            {"num_frames_per_block": 1, "local_attn_size": 12, "sink_size": 3},
            {"num_frames_per_block": 1, "window_frames": 12, "sink_frames": 3, "sink_positions": "absolute"},
        ),
        (
            {"local_attn_size": 9, "sink_size": 1, "rope_cache_policy": "relativistic"},
            {"window_frames": 9, "sink_frames": 1, "sink_positions": "window"},
        ),
        ({"local_attn_size": -1, "sink_size": 0}, {"window_frames": 21, "sink_frames": 0}),
    ],
)
def test_chunks_and_window_of_fastvideo(tmp_path, model, caplog, theirs, ours):
    """FastVideo's causal model has diffusers' layout and our class's name."""
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "CausalWanTransformer3DModel"
    (tmp_path / "config.json").write_text(json.dumps(config | theirs))
    assert load_source(str(tmp_path)).config["causal"] == config["causal"]
    del config["causal"]
    (tmp_path / "config.json").write_text(json.dumps(config | theirs))
    caplog.clear()
    source = load_source(str(tmp_path))
    assert source.config["causal"] == ours and "does not know" not in caplog.text
    assert same(source.tensors, model.state_dict())
    for loaded in (load_dense(source), load_checkpoint(tmp_path)):
        assert {key: getattr(loaded.causal, key) for key in ours} == ours
    assert read_model_config(tmp_path)[1]["causal"] == ours
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_cache_policy": "other"}))
    assert "rope_cache_policy other is not supported; use absolute or relativistic" in refusal(tmp_path)


@pytest.mark.parametrize("beside", [True, False])
def test_configuration_of_a_file_in_a_folder(tmp_path, monkeypatch, model, beside):
    monkeypatch.delitem(wan_files.PUBLISHED_HEADS, 24)
    (tmp_path / "checkpoints").mkdir()
    torch.save(published(model.state_dict(), "self_forcing"), tmp_path / "checkpoints/model.pt")
    assert "number of heads" in refusal(tmp_path, file="checkpoints/model.pt")
    (tmp_path / "config.json").write_text("{}" if beside else json.dumps(ORIGINAL))
    if beside:
        (tmp_path / "checkpoints/config.json").write_text(json.dumps(ORIGINAL))
    source = load_source(str(tmp_path), file="checkpoints/model.pt")
    assert same(source.tensors, model.state_dict())
    assert source.provenance()["file"] == "checkpoints/model.pt"
    assert refusal(tmp_path, file="model.pt") == f"{tmp_path} has no file model.pt"
    assert "is a file; leave file out" in refusal(tmp_path / "checkpoints/model.pt", file="model.pt")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"_class_name": "VaceWanModel"}, "its control blocks are not part"),
        ({"_class_name": "WanModelFast"}, "WanModelFast: the camera layers of LingBot-World are not part"),
        ({"_class_name": "CausalLingBotWorldTransformer3DModel"}, "the camera layers of LingBot-World are not part"),
        (
            {"_class_name": "HeliosTransformer3DModel"},
            "Helios recomputes its history in every pass, so it has no KV cache",
        ),
        ({"model_type": "vace"}, "a Wan model of type vace cannot be converted: its control blocks"),
        ({"model_type": "s2v"}, "its audio layers"),
        ({"model_type": "x2v"}, "type x2v cannot be converted: this type is not one of t2v, i2v, flf2v"),
        ({"in_dim": 3}, "3 input and 1 output channels cannot be converted: its control latents"),
        ({"dim": None}, "dim is missing from the WanModel configuration"),
        ({"num_layers": 3}, "lacks tensors blocks.2."),
        ({"ffn_dim": 48}, "tensor blocks.0.ffn.0.bias has shape [32], but its configuration expects [48] (and"),
    ],
)
def test_configuration_that_is_refused(tmp_path, original, changes, reason):
    assert reason in refusal(folder_of(tmp_path / "wan", original, **changes))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vace_blocks.0.before_proj.weight", "its control blocks"),
        ("motion_encoder.enc.fc.0.weight", "its motion encoder and face adapter"),
        ("face_adapter.fuser_blocks.0.k_norm.weight", "its motion encoder and face adapter"),
        ("casual_audio_encoder.weights", "its audio layers"),
        ("control_adapter.conv.weight", "its control latents"),
        ("ref_conv.weight", "its control latents"),
        ("blocks.0.cam_injector_layer1.weight", "the camera layers of LingBot-World"),
        ("patch_embedding_wancamctrl.weight", "the camera layers of LingBot-World"),
        ("blocks.0.action_model.mouse_mlp.0.weight", "the action modules of Matrix-Game"),
        ("patch_short.weight", "Helios recomputes its history"),
    ],
)
def test_near_misses_are_known_by_their_tensors(tmp_path, original, name, reason):
    torch.save({"model": original | {name: torch.zeros(1)}}, tmp_path / "near.pt")
    assert f"cannot be converted (tensor {name}: {reason}" in refusal(tmp_path / "near.pt")
    assert reason in refusal(folder_of(tmp_path / "wan", original | {name: torch.zeros(1)}))


def test_longlive_is_its_base_and_its_lora(tmp_path, model, original):
    """Laid out as in the repository; a LoRA of one module of each kind, with peft's names."""
    modules = [
        name.removesuffix(".weight") for name in original if name.startswith("blocks.1.") and original[name].ndim == 2
    ]
    generator = torch.Generator().manual_seed(0)
    wanted, lora = {name: x.clone() for name, x in original.items()}, {}
    for module in modules:
        weight = original[f"{module}.weight"]
        up, down = (torch.randn(shape, generator=generator) for shape in ((len(weight), 2), (2, weight.shape[1])))
        lora |= {f"base_model.model.{module}.lora_A.weight": down, f"base_model.model.{module}.lora_B.weight": up}
        wanted[f"{module}.weight"] += 256 / 2 * up @ down
    assert len(modules) == 10
    (tmp_path / "models").mkdir()
    torch.save({"generator": in_wan_names(model.state_dict(), "model.")}, tmp_path / "models" / "longlive_base.pt")
    torch.save({"generator_lora": lora}, tmp_path / "models" / "lora.pt")
    adapters = [AdapterConfig(file="models/lora.pt", alpha=256)]
    source = load_source(str(tmp_path), file="models/longlive_base.pt", causal=CAUSAL, use_ema=False, adapters=adapters)
    state = {ours: wanted[name] for ours, name in stored_names(wanted).items()}
    assert same(load_dense(source).state_dict(), state)


def test_lora(tmp_path, original):
    adapter = {f"base_model.model.blocks.0.self_attn.q.lora_{side}.weight": torch.zeros(1) for side in "AB"}
    for state in ({"generator_lora": adapter}, {"generator": original, "generator_lora": adapter}, adapter):
        torch.save(state, tmp_path / "lora.pt")
        assert "name the base model as the source and this file under source.adapters" in refusal(tmp_path / "lora.pt")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantized_weights(tmp_path, original, dtype):
    name = "blocks.0.self_attn.q.weight"
    state = original | {name: original[name].to(dtype), f"{name.removesuffix('weight')}scale_weight": torch.ones(1)}
    torch.save(state, tmp_path / "q.pt")
    stored = str(dtype).removeprefix("torch.")
    assert f"tensor {name} is stored as {stored}, and quantized weights" in refusal(tmp_path / "q.pt")
    save_file(state, tmp_path / "q.safetensors")
    assert "quantized weights cannot be converted" in refusal(tmp_path / "q.safetensors")
    (tmp_path / "q.gguf").touch()
    assert "GGUF weights are quantized" in refusal(tmp_path / "q.gguf")


def test_tensors_that_do_not_fit_are_called_what_the_file_calls_them(tmp_path, original):
    extra = {f"model.extra.{index}": torch.zeros(1) for index in range(5)}
    torch.save({"generator": original | extra}, tmp_path / "extra.pt")
    assert refusal(tmp_path / "extra.pt") == (
        f"{tmp_path / 'extra.pt'} has the unknown tensors generator.model.extra.0, generator.model.extra.1, "
        "generator.model.extra.2 and 2 more; it does not fit its configuration"
    )
    torch.save({"generator": original, "model.head.head.bias": torch.zeros(1)}, tmp_path / "beside.pt")
    assert len(load_source(str(tmp_path / "beside.pt")).tensors) == len(original)
    torch.save(original | {"module.head.head.bias": torch.zeros(1)}, tmp_path / "twice.pt")
    assert "holds the tensor head.head.bias twice" in refusal(tmp_path / "twice.pt")
    torch.save(original | {"proj_out.bias": torch.zeros(1)}, tmp_path / "double.pt")
    assert "holds the tensor head.head.bias under two names" in refusal(tmp_path / "double.pt")


class Runs:
    """A pickle that creates a folder if it is loaded without restrictions."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_is_never_run(tmp_path, monkeypatch, original):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(original | {"args": Runs(tmp_path / "ran")}, tmp_path / "code.pt")
    message = refusal(tmp_path / "code.pt")
    assert message.startswith(f"{tmp_path / 'code.pt'} needs code to be run ({os.mkdir.__module__}.mkdir), which is")
    assert message.endswith("write its tensors with safetensors.torch.save_file")
    assert not (tmp_path / "ran").exists()


def test_files_that_cannot_be_read(tmp_path, original):
    path = tmp_path / "model.pt"
    torch.save(original, path, _use_new_zipfile_serialization=False)
    assert "is in the format before torch 1.6, which cannot be read tensor by tensor; load it" in refusal(path)
    torch.save(original, path)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    assert refusal(path) == f"{path} is truncated; download it again"
    path.write_bytes(b"")
    assert "was not written by torch.save" in refusal(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "is a git-lfs pointer" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other.txt", "text")
    assert f"{path} cannot be read (" in refusal(path)
    torch.save([torch.zeros(1)], path)
    assert f"{path} holds a list, not named tensors" in refusal(path)
    looped: dict[str, Any] = {"a": torch.zeros(1)}
    looped["b"] = looped
    torch.save(looped, path)
    assert "are of no supported model" in refusal(path)


def resident(path: Path) -> int:
    """Bytes of the mapped file that are resident in this process."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counts = line.endswith(str(path))
        elif counts and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
def test_pickled_tensors_are_read_one_at_a_time(tmp_path):
    path = tmp_path / "large.pt"
    torch.save({"generator": {f"t{index}": torch.full((512, 512), float(index)) for index in range(32)}}, path)

    tensors = LazyTensors.from_files([path])
    assert tensors.shapes() == {f"generator.t{index}": (512, 512) for index in range(32)}
    assert tensors.dtype("generator.t3") == torch.float32
    assert resident(path) < 2**18  # seen: 0 of 32 MiB
    assert float(tensors["generator.t3"].mean()) == 3
    assert 2**20 <= resident(path) < 2**20 + 2**18  # seen: 1.06 MiB
    tensors.release()
    assert resident(path) == 0


def test_safetensors_and_pickles_are_one_interface(tmp_path, original):
    torch.save(original, tmp_path / "a.pt")
    save_file(original, tmp_path / "a.safetensors")
    pickled, safe = (LazyTensors.from_files([tmp_path / f"a.{suffix}"]) for suffix in ("pt", "safetensors"))
    assert pickled.shapes() == safe.shapes()
    assert {name: pickled.dtype(name) for name in pickled} == {name: safe.dtype(name) for name in safe}
    assert same(pickled, load_file(tmp_path / "a.safetensors"))
    assert same(safe, original)


PUBLISHED = re.findall(
    r"\| `(\{model: .+?\})` \|", (Path(__file__).parents[1] / "docs" / "import.md").read_text(encoding="utf-8")
)


def test_the_table_of_published_checkpoints_has_rows():
    assert len(PUBLISHED) == 12


@pytest.mark.parametrize("row", PUBLISHED)
def test_sources_of_published_checkpoints_are_asked_of_the_hub(monkeypatch, row):
    """Every entry of the table is a valid source in a recipe, and none is refused before the Hub is asked."""

    def download(model, *arguments):
        raise UserError(f"asked for {model}")

    monkeypatch.setattr(locate, "download", download)
    source = SourceConfig(**yaml.safe_load(row))
    arguments = source.model_dump(include={"subfolder", "file", "use_ema"}) | {"adapters": source.adapters}
    assert refusal(source.model, **arguments) == f"asked for {source.model}"
