"""The contents of an export: the pipeline, the source's components, the evidence; complete or not written at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import yaml
from checkpoint_case import pico_mla
from warm import Python

from mla_convert.errors import UserError
from mla_convert.export import components as components_module
from mla_convert.export.checkpoint import save_checkpoint
from mla_convert.export.config import ExportConfig
from mla_convert.export.manifest import read_manifest, verify_files
from mla_convert.export.release import export
from mla_convert.files import MANIFEST, sha256
from mla_convert.run.video import save_video

RECIPE = {"version": 1, "convert": {"position": "rotate_on_read", "kv_lora_rank": [10, 8]}, "distill": []}
SOURCE = {"model": "owner/model", "revision": None, "family": "wan", "license": "apache-2.0"}
RECORDED = {"recipe": RECIPE, "source": SOURCE}
BENCH = {
    "keys": 1200,
    "queries": 300,
    "dtype": "float32",
    "device": "CPU, 1 thread",
    "repeats": 5,
    "attention": {"dense": {"median_ms": 2.5}, "latent": {"median_ms": 3.0}},
}


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


class Bare(diffusers.DiffusionPipeline):
    """The smallest folder that diffusers accepts as a pipeline."""

    _optional_components = ["scheduler"]

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)


@pytest.fixture
def source(tmp_path):
    """The folder of a pipeline that a model was made from: a scheduler, and a VAE that is not used here."""
    folder = tmp_path / "source"
    diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0).save_pretrained(folder / "scheduler")
    index = {"_class_name": "WanPipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    index |= {"transformer": ["diffusers", "WanTransformer3DModel"], "vae": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def made_from(source: str | Path, folder: Path, **more: str) -> Path:
    """A checkpoint whose manifest names its source."""
    save_checkpoint(pico_mla(), folder, {"source": SOURCE | {"model": str(source), **more}})
    return folder


def test_exported_folder_is_a_pipeline(saved, tmp_path):
    export(saved, tmp_path / "out", ExportConfig(components="none"))
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index == {
        "_class_name": "StreamingMLAPipeline",
        "_diffusers_version": diffusers.__version__,
        "transformer": ["diffusers", "MLAWanTransformer3DModel"],
    }
    loaded = Bare.from_pretrained(tmp_path / "out", scheduler=None)
    assert type(loaded.transformer) is diffusers.MLAWanTransformer3DModel
    alone = diffusers.AutoModel.from_pretrained(str(tmp_path / "out"), subfolder="transformer")
    assert type(alone) is diffusers.MLAWanTransformer3DModel


def test_components_are_copied(source, tmp_path):
    checkpoint = made_from(source / "transformer", tmp_path / "saved")
    export(checkpoint, tmp_path / "out", ExportConfig(components="copy"))
    loaded = Bare.from_pretrained(tmp_path / "out")
    assert loaded.scheduler.config.shift == 5.0
    assert "scheduler/scheduler_config.json" in read_manifest(tmp_path / "out")["files"]

    shutil.rmtree(source / "scheduler")
    config = ExportConfig(components="copy")
    assert f"{source / 'scheduler'} does not exist" in refusal(export, checkpoint, tmp_path / "two", config)
    shutil.rmtree(source)
    assert "change export.components" in refusal(export, checkpoint, tmp_path / "two", config)
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full: cannot write {out}; free some space"),
        (errno.EACCES, "no permission to open {file}"),
    ],
)
def test_a_copy_that_fails_says_why(source, tmp_path, monkeypatch, number, message):
    """`shutil.copytree` collects errors and keeps only their texts."""
    checkpoint = made_from(source / "transformer", tmp_path / "saved")

    def failing(old, new, **settings):
        raise OSError(number, os.strerror(number), os.fspath(old), None, os.fspath(new))

    monkeypatch.setattr(shutil, "copyfile", failing)
    named = message.format(out=tmp_path / "out", file=source / "scheduler" / "scheduler_config.json")
    assert named in refusal(export, checkpoint, tmp_path / "out", ExportConfig(components="copy"))
    assert not (tmp_path / "out").exists()


def test_components_on_the_hub_are_referenced(source, tmp_path, monkeypatch):
    asked = []

    def download(repository, revision, patterns):
        asked.append((repository, revision, patterns))
        return source

    monkeypatch.setattr(components_module, "download", download)
    checkpoint = made_from("owner/model", tmp_path / "saved", revision="0123456789abcdef")
    export(checkpoint, tmp_path / "out", ExportConfig())
    assert asked == [("owner/model", "0123456789abcdef", ["model_index.json"])]
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["scheduler"] == [None, None]
    assert index["_components"] == {
        "scheduler": {
            "repository": "owner/model",
            "revision": "0123456789abcdef",
            "subfolder": "scheduler",
            "library": "diffusers",
            "class": "FlowMatchEulerDiscreteScheduler",
        }
    }
    assert Bare.from_pretrained(tmp_path / "out").scheduler is None

    export(checkpoint, tmp_path / "copied", ExportConfig(components="copy"))
    assert asked[-1] == ("owner/model", "0123456789abcdef", ["scheduler/*"])
    assert Bare.from_pretrained(tmp_path / "copied").scheduler.config.shift == 5.0


def test_components_of_a_source_without_any_are_those_that_it_names(source, tmp_path, monkeypatch):
    commit = tmp_path / "0123456789abcdef"
    commit.symlink_to(source)
    asked = []
    monkeypatch.setattr(components_module, "download", lambda *given: asked.append(given) or commit)
    named = {"revision": "fedcba", "components": "owner/base"}
    export(made_from("owner/student", tmp_path / "saved", **named), tmp_path / "out", ExportConfig())
    assert asked == [("owner/base", None, ["model_index.json"])]
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    entry = index["_components"]["scheduler"]
    assert (entry["repository"], entry["revision"]) == ("owner/base", commit.name)

    local = made_from("owner/student", tmp_path / "local", components=str(source))
    export(local, tmp_path / "copied", ExportConfig(components="copy"))
    assert Bare.from_pretrained(tmp_path / "copied").scheduler.config.shift == 5.0


def test_components_that_cannot_be_reached_stop_a_copy_alone(tmp_path, monkeypatch):
    def download(repository, revision, patterns):
        raise UserError("the Hub cannot be reached")

    monkeypatch.setattr(components_module, "download", download)
    checkpoint = made_from("owner/model", tmp_path / "saved", revision="0123456789abcdef")
    export(checkpoint, tmp_path / "out", ExportConfig())
    assert "scheduler" not in json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert "cannot be reached" in refusal(export, checkpoint, tmp_path / "two", ExportConfig(components="copy"))


def test_a_local_source_is_not_referenced(source, tmp_path):
    """Its path is meaningless to others."""
    export(made_from(source, tmp_path / "saved"), tmp_path / "out", ExportConfig())
    assert str(source) not in (tmp_path / "out" / "model_index.json").read_text()


def test_evidence_travels_and_may_be_renewed(saved, tmp_path):
    run = tmp_path / "run"
    shutil.move(saved, run / "checkpoint")
    (run / "state.json").write_text('{"format": 1, "recipe_sha256": "", "steps": {}}')
    (run / "report.json").write_text('{"student_loss": 0.5}')
    (run / "report.html").write_text("<p>page</p>")
    (run / "bench.json").write_text(json.dumps(BENCH))
    frames = np.linspace(0, 1, 4 * 16 * 16 * 3, dtype=np.float32).reshape(4, 16, 16, 3)
    (run / "samples").mkdir()
    save_video(frames, run / "samples" / "00-seven.mp4", fps=4)

    export(run, tmp_path / "out", ExportConfig())
    manifest = read_manifest(tmp_path / "out")
    assert set(manifest["evidence"]) == {
        "recipe.resolved.yaml",
        "report.json",
        "report.html",
        "bench.json",
        "figures/cache_by_layer.png",
        "samples/00-seven.mp4",
        "samples/sample.gif",
    }
    for name, digest in manifest["evidence"].items():
        assert sha256(tmp_path / "out" / name) == digest
    assert yaml.safe_load((tmp_path / "out" / "recipe.resolved.yaml").read_text()) == RECIPE
    everything = {"README.md", MANIFEST, *manifest["files"], *manifest["evidence"]}
    assert set(contents(tmp_path / "out")) == everything

    # A new evaluation replaces the report in place; the model is still what was written.
    (tmp_path / "out" / "report.json").write_text('{"student_loss": 0.25}')
    verify_files(tmp_path / "out", manifest, tmp_path / "out" / "transformer")
    export(tmp_path / "out", tmp_path / "again", ExportConfig())
    again = read_manifest(tmp_path / "again")
    assert again["evidence"].keys() == manifest["evidence"].keys()
    assert again["evidence"]["report.json"] == sha256(tmp_path / "out" / "report.json")


def test_sample_that_is_no_video_is_one_clear_line(saved, tmp_path):
    (saved / "samples").mkdir()
    (saved / "samples" / "00.mp4").write_text("not a video")
    assert "00.mp4 cannot be read as a video" in refusal(export, saved, tmp_path / "out", ExportConfig())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("exchange", [True, False])
def test_killed_export_leaves_the_old_state_or_the_new(saved, tmp_path, exchange):
    """Killed before every file system operation in turn: the folder is complete, first the old one, then the new one.

    Where folders cannot be exchanged in one step, neither exists for a moment; the next export restores
    the old one.
    """
    if exchange and sys.platform != "linux":
        pytest.skip("exchanging two folders in one step is Linux's")
    save_checkpoint(pico_mla(seed=1), tmp_path / "other", RECORDED)
    script = Path(__file__).with_name("killed_export.py")
    done = Python(script, saved, tmp_path / "other", tmp_path / "out", str(exchange)).finish()
    assert done.code == 0, done.err
    states = json.loads(done.out)
    missing = states.count("missing")
    assert missing == (0 if exchange else 1)
    old, new = states.count("old"), states.count("new")
    assert states == ["old"] * old + ["missing"] * missing + ["new"] * new
    assert old > 10 and new >= 1
