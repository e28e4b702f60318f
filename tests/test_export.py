"""Checkpoints have equal bytes for equal weights, and load where they should and nowhere else."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import torch
from checkpoint_case import CAUSAL, PAIRS, STOCK, pico_dense, pico_mla, pico_velocity
from pydantic import ValidationError
from safetensors import SafetensorError

from mla_convert.errors import UserError
from mla_convert.export import manifest as manifest_module
from mla_convert.export import release as release_module
from mla_convert.export.checkpoint import load_checkpoint, load_shape, refuse_stock_loading, save_checkpoint
from mla_convert.export.config import ExportConfig
from mla_convert.export.manifest import read_manifest, verify_files
from mla_convert.export.release import export
from mla_convert.files import MANIFEST
from mla_convert.load import LazyTensors

RECIPE = {"version": 1, "convert": {"position": "rotate_on_read", "kv_lora_rank": [10, 8]}, "distill": []}
SOURCE = {"model": "owner/model", "revision": "0123456789abcdef", "family": "wan", "license": "apache-2.0"}
RECORDED = {"recipe": RECIPE, "source": SOURCE}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    """A converted checkpoint in float32."""
    save_checkpoint(pico_mla(), tmp_path / "saved", RECORDED)
    return tmp_path / "saved"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(call, *arguments, **keywords) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("position", PAIRS)
def test_converted_model_survives_save_and_load(tmp_path, position):
    model = pico_mla(position=position)
    save_checkpoint(model, tmp_path / "saved", {})
    expected = pico_velocity(model)

    assert torch.equal(pico_velocity(load_checkpoint(tmp_path / "saved", verify=True)), expected)
    inner = tmp_path / "saved" / "transformer"
    assert torch.equal(pico_velocity(type(model).from_pretrained(inner, disable_mmap=True)), expected)
    from_diffusers = diffusers.AutoModel.from_pretrained(str(tmp_path / "saved"), subfolder="transformer")
    assert type(from_diffusers) is type(model)
    # Tensors that are mapped from a file need not be aligned, which changes the order of some sums.
    torch.testing.assert_close(pico_velocity(from_diffusers), expected, atol=2e-6, rtol=0)


def test_dense_model_survives_save_and_load(tmp_path):
    model = pico_dense()
    save_checkpoint(model, tmp_path / "saved", {})
    loaded = load_checkpoint(tmp_path / "saved", verify=True)
    assert type(loaded) is type(model)
    assert torch.equal(pico_velocity(loaded), pico_velocity(model))


@pytest.mark.parametrize("position", PAIRS)
@pytest.mark.parametrize("own_chunk", ["exact", "latent"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_stock_class_refuses_a_converted_checkpoint(tmp_path, position, own_chunk, dtype):
    model = pico_mla(position=position, own_chunk=own_chunk)
    save_checkpoint(model, tmp_path / "saved", {})
    inner = tmp_path / "saved" / "transformer"
    stock = diffusers.WanTransformer3DModel

    with pytest.raises(ValueError, match="expected shape"):
        stock.from_pretrained(inner, dtype=dtype)
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        stock.from_pretrained(inner, dtype=dtype, low_cpu_mem_usage=False, ignore_mismatched_sizes=True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        stock(**STOCK).load_state_dict(model.state_dict(), strict=False)


def test_stock_class_refuses_where_this_package_is_unknown(saved):
    """diffusers warns less if the class is its attribute, so this is tested without that as well."""
    code = f"import diffusers; diffusers.WanTransformer3DModel.from_pretrained({str(saved / 'transformer')!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "ValueError: Cannot load" in run.stderr


def test_model_that_the_stock_class_would_load_is_not_written(tmp_path, monkeypatch):
    model = pico_mla()
    dense = pico_dense().state_dict()
    looks_right = {**model.state_dict(), **dense}
    monkeypatch.setattr(model, "state_dict", lambda: looks_right)

    with pytest.raises(ValueError, match="has no tensor that a stock class refuses"):
        refuse_stock_loading(model)
    with pytest.raises(ValueError, match="has no tensor that a stock class refuses"):
        save_checkpoint(model, tmp_path / "saved", {})
    assert list(tmp_path.iterdir()) == []


def test_pipeline_finds_the_class_in_diffusers(saved, tmp_path):
    """As `["diffusers", cls]` in model_index.json, and as a saved pipeline names it."""
    index = {
        "_class_name": "WanPipeline",
        "transformer": ["diffusers", "MLAWanTransformer3DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    (saved / "model_index.json").write_text(json.dumps(index))
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(saved / "scheduler")
    absent = {"vae": None, "text_encoder": None, "tokenizer": None}

    pipeline = diffusers.DiffusionPipeline.from_pretrained(saved, **absent)
    pipeline.save_pretrained(tmp_path / "again")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again", **absent)

    for loaded in (pipeline, again):
        assert type(loaded.transformer) is diffusers.MLAWanTransformer3DModel


def test_same_weights_are_the_same_bytes(tmp_path, saved):
    save_checkpoint(pico_mla(), tmp_path / "again", RECORDED)
    # A model that was loaded carries where from; that must not show.
    loaded = diffusers.MLAWanTransformer3DModel.from_pretrained(saved / "transformer")
    save_checkpoint(loaded, tmp_path / "loaded", RECORDED)

    assert contents(tmp_path / "again") == contents(saved) == contents(tmp_path / "loaded")
    save_checkpoint(pico_mla(seed=1), saved, RECORDED)
    assert contents(tmp_path / "again")[WEIGHTS] != contents(saved)[WEIGHTS]


def test_files_have_the_usual_mode(saved):
    modes = {stat.S_IMODE(path.stat().st_mode) for path in saved.rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_manifest(saved):
    manifest = read_manifest(saved)
    model = manifest["model"]

    assert (manifest["recipe"], manifest["source"]) == (RECIPE, SOURCE)
    assert {"torch", "diffusers", "mla_convert"} <= manifest["versions"].keys()
    assert sorted(manifest["files"]) == ["transformer/config.json", WEIGHTS]
    assert (model["class"], model["family"]) == ("MLAWanTransformer3DModel", "wan")
    assert model["mla"]["kv_lora_rank"] == [10, 8]
    assert model["layer_scalars_per_token"] == [10, 8]
    assert model["dense_scalars_per_token"] == 48
    assert model["latent_scalars_per_token"] == 9
    assert model["reduction"] == pytest.approx(1 - 9 / 48)


def test_manifest_counts_the_shared_key(tmp_path):
    save_checkpoint(pico_mla(position="decoupled"), tmp_path / "saved", {})
    assert read_manifest(tmp_path / "saved")["model"]["layer_scalars_per_token"] == [16, 14]


def test_git_revision_is_that_of_a_checkout_of_this_package(tmp_path, monkeypatch):
    identity = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    package = tmp_path / "mla_convert"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setattr(manifest_module, "_PACKAGE", package)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), *arguments]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, env={**os.environ, **identity}
        ).stdout.strip()

    assert manifest_module.git_revision() is None
    git("init")
    git("commit", "--allow-empty", "-m", "another project")
    assert manifest_module.git_revision() is None
    git("add", ".")
    git("commit", "-m", "this one")
    assert manifest_module.git_revision() == git("rev-parse", "HEAD")
    (package / "__init__.py").write_text("changed = True\n")
    assert manifest_module.git_revision() == f"{git('rev-parse', 'HEAD')}-dirty"


def test_run_checkpoint_and_transformer_folders_load(saved, tmp_path):
    shutil.move(saved, tmp_path / "run" / "checkpoint")
    run = tmp_path / "run"
    for folder in (run, run / "checkpoint", run / "checkpoint" / "transformer"):
        assert type(load_checkpoint(folder, verify=True)).__name__ == "MLAWanTransformer3DModel"


def test_folder_without_a_manifest_loads_unverified(tmp_path):
    pico_mla().save_pretrained(tmp_path / "plain")
    assert load_checkpoint(tmp_path / "plain").causal.model_dump().items() >= CAUSAL.items()
    assert refusal(load_checkpoint, tmp_path / "plain", verify=True) == f"{tmp_path / 'plain' / MANIFEST} is missing"


def test_export(saved, tmp_path):
    before = contents(saved)
    result = export(saved, tmp_path / "out", ExportConfig(dtype="bfloat16", max_shard_size="20KB"))

    out = tmp_path / "out"
    assert contents(saved) == before
    assert (result["path"], result["class"], result["dtype"]) == (str(out), "MLAWanTransformer3DModel", "bfloat16")
    assert result["bytes"] == sum(map(len, contents(out).values()))
    assert (out / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    manifest = read_manifest(out)
    verify_files(out, manifest, out / "transformer")
    assert (manifest["recipe"], manifest["source"]) == (RECIPE, SOURCE)
    model = load_checkpoint(out)
    assert model.dtype == torch.bfloat16
    assert torch.equal(pico_velocity(model), pico_velocity(load_checkpoint(saved, torch.bfloat16)))


def test_export_twice_gives_the_same_bytes(saved, tmp_path):
    export(saved, tmp_path / "one", ExportConfig())
    export(saved, tmp_path / "two", ExportConfig())
    export(saved, tmp_path / "two", ExportConfig())
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_export_compares_what_it_wrote(saved, tmp_path, monkeypatch):
    original = release_module.write_model

    def write_and_damage(model, folder, *rest, **more):
        original(model, folder, *rest, **more)
        path = folder / Path(WEIGHTS).name
        path.write_bytes(path.read_bytes()[:-4] + bytes(4))

    monkeypatch.setattr(release_module, "write_model", write_and_damage)
    message = refusal(export, saved, tmp_path / "out", ExportConfig())
    assert "differs after reloading" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


def test_export_refuses_changed_or_missing_files(saved, tmp_path):
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[:-4] + b"abcd")
    assert "sha256 differs" in refusal(export, saved, tmp_path / "out", ExportConfig())
    (saved / WEIGHTS).unlink()
    assert f"{saved / WEIGHTS} is missing" in refusal(export, saved, tmp_path / "out", ExportConfig())
    assert not (tmp_path / "out").exists()


def test_damaged_checkpoints_are_one_clear_line(saved):
    config = saved / "transformer" / "config.json"
    good, weights = config.read_text(), (saved / WEIGHTS).read_bytes()

    (saved / WEIGHTS).write_bytes(weights[:-1])
    assert "is truncated or not a safetensors file" in refusal(load_checkpoint, saved)
    tensors = safetensors.torch.load(weights)
    safetensors.torch.save_file({**tensors, "proj_out.bias": torch.zeros(3)}, saved / WEIGHTS)
    assert "tensor proj_out.bias has shape [3]" in refusal(load_checkpoint, saved)
    safetensors.torch.save_file({**tensors, "proj_out.bias": torch.full((16,), torch.nan)}, saved / WEIGHTS)
    assert "tensor proj_out.bias has 16 NaN" in refusal(load_checkpoint, saved)
    (saved / WEIGHTS).write_bytes(weights)

    config.write_text(good.replace("MLAWanTransformer3DModel", "MLAOtherModel"))
    message = refusal(load_checkpoint, saved)
    assert "cannot load a model of class MLAOtherModel; supported are " in message
    assert "MLAWanTransformer3DModel" in message
    changed = json.loads(good)
    changed["mla"]["kv_lora_rank"] = [10]
    config.write_text(json.dumps(changed))
    assert "does not describe a MLAWanTransformer3DModel" in refusal(load_checkpoint, saved)
    config.write_text("{")
    assert "is not valid JSON" in refusal(load_checkpoint, saved)
    config.write_text(good)

    (saved / MANIFEST).write_text("not json")
    assert "is not valid JSON" in refusal(load_checkpoint, saved, verify=True)
    (saved / MANIFEST).write_text('{"format": 99}')
    assert "has format 99, this version reads 1; update mla-convert" in refusal(load_checkpoint, saved, verify=True)


def test_folders_that_hold_no_checkpoint(tmp_path):
    assert refusal(load_checkpoint, tmp_path / "nothing") == f"{tmp_path / 'nothing'} does not exist"
    assert "holds no checkpoint" in refusal(load_checkpoint, tmp_path)


def test_foreign_output_folders_stay_as_they_are(saved, tmp_path):
    foreign, run = tmp_path / "foreign", tmp_path / "run"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years")
    run.mkdir()
    (run / "state.json").write_text("{}")
    (tmp_path / "file").touch()

    for folder, reason in (
        (foreign, "exists and is not a checkpoint of mla-convert"),
        (run, "is a run folder"),
        (tmp_path / "file", "is a file"),
    ):
        assert reason in refusal(save_checkpoint, pico_mla(), folder, {})
        assert reason in refusal(export, saved, folder, ExportConfig())
    for folder in (saved, saved / "inner"):
        assert "overlaps the checkpoint" in refusal(export, saved, folder, ExportConfig())
    assert contents(foreign) == {"thesis.txt": b"years"}
    assert contents(run) == {"state.json": b"{}"}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_leaves_nothing(tmp_path, monkeypatch, error):
    def fail(*arguments, **keywords):
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    assert "the disk is full" in refusal(save_checkpoint, pico_mla(), tmp_path / "saved", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings", [{"dtype": "float8"}, {"max_shard_size": "5 GB"}, {"form": "both"}, {"components": True}, {"shards": 3}]
)
def test_export_settings_are_strict(settings):
    with pytest.raises(ValidationError):
        ExportConfig(**settings)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_shape_is_that_of_the_model_without_its_weights(tmp_path, monkeypatch, dtype):
    save_checkpoint(pico_mla(), tmp_path / "float32", {})
    model = load_checkpoint(tmp_path / "float32", dtype)
    save_checkpoint(model, tmp_path / "saved", {}, max_shard_size="20KB")
    whole = load_checkpoint(tmp_path / "saved")
    monkeypatch.setattr(LazyTensors, "__getitem__", lambda self, name: pytest.fail("a tensor is read"))
    shape = load_shape(tmp_path / "saved")
    assert shape.config == whole.config and shape.dtype == whole.dtype and not shape.training
    described = [{n: (t.shape, t.dtype) for n, t in model.state_dict().items()} for model in (shape, whole)]
    assert described[0] == described[1]
    assert {tensor.device.type for tensor in shape.state_dict().values()} == {"meta"}
    for file in (tmp_path / "saved").rglob("*.safetensors"):
        file.unlink()
    assert load_shape(tmp_path / "saved", dtypes=False).config == whole.config
    with pytest.raises(UserError):
        load_shape(tmp_path / "saved")
