"""The model card says what was converted and measured, and nothing else; its links and its code work."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers.utils.dynamic_modules_utils as remote_code
import numpy as np
import pytest
import torch
from checkpoint_case import pico_dense, pico_mla
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

from mla_convert.export.card import find_origin, find_samples, render_card
from mla_convert.export.checkpoint import save_checkpoint
from mla_convert.export.citations import BASE_MODELS, VIDEO_MLA
from mla_convert.export.components import Components
from mla_convert.export.config import ExportConfig
from mla_convert.export.evidence import Evidence
from mla_convert.export.manifest import read_manifest
from mla_convert.export.release import export
from mla_convert.run.video import save_video

RECIPE = {
    "version": 1,
    "source": {"model": "/home/somebody/teacher"},
    "data": {"kind": "latents"},
    "convert": {"position": "rotate_on_read", "kv_lora_rank": [10, 8]},
    "distill": [{"stage": "match_velocity", "steps": 10}],
    "generate": {"prompts": ["a cat, walking", "a dog"]},
}
SOURCE = {"model": "owner/model", "revision": "0123456789abcdef", "family": "wan", "license": "apache-2.0"}
PLAN = {"max_streams_dense": 11, "max_streams_latent": 62, "gpu": "H100 80 GB"}
REPORT = {
    "teacher_loss": 0.1,
    "converted_loss": 0.12,
    "student_loss": 0.103,
    "velocity_rel_error": 0.0421,
    "velocity_rel_error_by_timestep": [[0.25, 0.05], [0.75, 0.03]],
    "attention_rel_error": [0.01, 0.03],
    "accuracy": {"teacher": {"1x": 1.0}, "student": {"1x": 0.958, "8x": 0.875}},
    "dense_cache_bytes": 6_040_000_000,
    "latent_cache_bytes": 440_300_000,
    "plan": PLAN,
    "curves": [{"stage": "match_velocity", "step": step, "heldout_loss": 0.12 - step / 1000} for step in (0, 10)],
}
BENCH = {
    "keys": 32760,
    "queries": 4680,
    "dtype": "bfloat16",
    "device": "NVIDIA H100",
    "repeats": 5,
    "num_inference_steps": 4,
    "attention": {"dense": {"median_ms": 2.512}, "latent": {"median_ms": 1.25}},
    "attention_streamed": {"dense": {"median_ms": 2.6}, "latent": {"median_ms": 1.3}},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a converted checkpoint, a report, a speed measurement and two samples."""
    folder = tmp_path / "run"
    save_checkpoint(pico_mla(position="decoupled"), folder / "checkpoint", {"recipe": RECIPE, "source": SOURCE})
    (folder / "state.json").write_text('{"format": 1, "recipe_sha256": "", "steps": {}}')
    (folder / "report.json").write_text(json.dumps(REPORT))
    (folder / "report.html").write_text("<p>page</p>")
    (folder / "bench.json").write_text(json.dumps(BENCH))
    (folder / "samples").mkdir()
    frames = np.linspace(0, 1, 4 * 16 * 16 * 3, dtype=np.float32).reshape(4, 16, 16, 3)
    for index, name in enumerate(("a-cat", "a-dog")):
        save_video(frames, folder / "samples" / f"{index:02d}-{name}.mp4", fps=4)
    return folder


@pytest.fixture
def released(run: Path, tmp_path: Path) -> Path:
    export(run, tmp_path / "out", ExportConfig(components="none"))
    return tmp_path / "out"


def card_of(manifest: dict[str, Any], report: dict[str, Any] | None = None, **more: Any) -> str:
    return render_card(manifest, Evidence(report), **more)


def test_metadata(released):
    data = ModelCard.load(released / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-video")
    assert (data.base_model, data.get("base_model_relation")) == ("owner/model", "finetune")
    assert data.license == "apache-2.0"
    assert {"mla", "wan", "multi-head-latent-attention"} <= set(data.tags)
    assert data.get("widget") == [
        {"text": "a cat, walking", "output": {"url": "samples/00-a-cat.mp4"}},
        {"text": "a dog", "output": {"url": "samples/01-a-dog.mp4"}},
    ]


def test_what_was_measured_is_there(released):
    text = (released / "README.md").read_text()
    for row in (
        "| cached scalars per token per layer | 48 | 15 |",
        "| cache relative to the dense model | 100 % | 31.2 % |",
        "| 0 | 10 | 6 | 16 | 1 % |",
        "| 1 | 8 | 6 | 14 | 3 % |",
        "| held-out flow-matching loss, dense model | 0.1000 |",
        "| held-out loss, converted, before training | 0.1200 (+20.0 %) |",
        "| held-out loss, this model | 0.1030 (+3.0 %) |",
        "| velocity error relative to the dense model | 4.21 % |",
        "| attention output error, mean over layers and worst layer | 2 %, 3 % |",
        "| prompted digit recognized at 1x the training length | 95.8 % (dense 100 %) |",
        "| prompted digit recognized at 8x the training length | 87.5 % |",
        "| cache of one stream, full window | 6.04 GB | 440 MB |",
        "| parallel streams on one H100 80 GB (computed) | 11 | 62 |",
        "| training stages | | `match_velocity` |",
        "2.51 ms dense,\n1.25 ms latent (medians of 5). Mean over the passes of one streamed chunk (4 steps and the "
        "pass that writes the cache): 2.6 ms dense, 1.3 ms latent. `mla-convert bench DIR` measures this.",
        "kv_lora_rank:\n  - 10",
        VIDEO_MLA.bibtex,
        BASE_MODELS["wan"].bibtex,
    ):
        assert row in text
    assert "somebody" not in text


def test_it_renders(released):
    """Tables, pictures and folded parts, as rendered from the Markdown."""
    content = ModelCard.load(released / "README.md").content.partition("\n---\n")[2]
    assert not re.search(r"\n{4,}|[ \t]\n|\{%|\{\{ |None\b", content)
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(content)
    # Converted, by layer, measured, pictures, memory.
    assert html.count("<table>") == html.count("</table>") == 5
    assert html.count("<img") == 5
    assert html.count("<details>") == html.count("</details>") == 2
    assert html.count("<h1>") == 1
    assert re.findall(r"<h2>(.*?)</h2>", html) == [
        "Use",
        "What was converted",
        "Measured",
        "Memory and speed",
        "Limits",
        "Citation",
    ]
    # Outside of tables and code a pipe would be a table that was not understood.
    prose = re.sub(r"(?s)<(table|pre)>.*?</\1>", "", html)
    assert "|" not in prose


def test_its_files_are_there(released):
    text = (released / "README.md").read_text()
    named = set(re.findall(r"\]\(([^):]+)\)", text)) | set(re.findall(r"url: (\S+\.mp4)", text))
    assert {"figures/error_by_layer.png", "samples/sample.gif", "report.html", "recipe.resolved.yaml"} <= named
    assert [name for name in sorted(named) if not (released / name).exists()] == []
    for picture in (released / "figures").iterdir():
        with Image.open(picture) as image:
            assert image.width > image.height > 300
    with Image.open(released / "samples" / "sample.gif") as animation:
        assert animation.info["loop"] == 0
        assert animation.n_frames > 1


def test_without_a_report_or_a_recipe_it_says_so(run):
    manifest = read_manifest(run / "checkpoint") | {"recipe": None, "source": None}
    card = card_of(manifest)
    assert "was not evaluated" in card
    assert "Speed was not measured" in card
    assert "converted but not trained" in card
    for absent in ("base_model", "license:", "Gallery", "report.html", "!["):
        assert absent not in card


@pytest.mark.parametrize(("license", "said"), [("mit", "License: `mit`"), (None, "The source names no license.")])
def test_license_is_that_of_the_source_or_none(run, license, said):
    manifest = read_manifest(run / "checkpoint") | {"source": SOURCE | {"license": license}}
    card = card_of(manifest)
    assert said in card
    assert (f"\nlicense: {license}\n" in card) == (license is not None)
    assert ("\nlicense:" in card) == (license is not None)


@pytest.mark.parametrize(
    ("source", "name", "hub"),
    [
        ({"model": "owner/model", "revision": "abc"}, "owner/model", "owner/model"),
        ({"model": "folder/model", "revision": None}, "model", None),
        ({"model": "/home/somebody/teacher", "revision": None}, "teacher", None),
        ({"model": "zoo:digits"}, "zoo:digits", None),
        ({}, None, None),
    ],
)
def test_origin(run, source, name, hub):
    origin = find_origin(source)
    assert (origin.name, origin.hub_id) == (name, hub)
    card = card_of(read_manifest(run / "checkpoint") | {"source": source})
    assert "somebody" not in card
    assert (f"base_model: {hub}\n" in card) == (hub is not None)


@pytest.mark.parametrize(
    ("source", "adapters", "text"),
    [
        (SOURCE, [("lora.pt", 1.0)], "revision 0123456789ab and the LoRA `lora.pt`, with mla-convert"),
        (
            {"model": "/a/base"},
            [("a.pt", 1.0), ("b.pt", 0.5)],
            "from `base` and the LoRA `a.pt` and the LoRA `b.pt` (scale 0.5), with mla-convert",
        ),
    ],
)
def test_adapters_are_said(run, source, adapters, text):
    manifest = read_manifest(run / "checkpoint")
    listed = [{"file": file, "scale": scale} for file, scale in adapters]
    card = render_card({**manifest, "source": {**source, "adapters": listed}}, Evidence())
    assert text in " ".join(card.split())


def test_dense_checkpoint_has_a_card_too(tmp_path):
    save_checkpoint(pico_dense(), tmp_path / "dense", {})
    export(tmp_path / "dense", tmp_path / "out", ExportConfig())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "with a dense cache" in card
    for absent in ("latent attention", "kv_lora_rank", "yesiltepe", "| position", "lossy"):
        assert absent not in card


def test_an_expert_is_called_one(run):
    manifest = read_manifest(run / "checkpoint")
    assert "expert" not in card_of(manifest)
    source = {"source": {"noise_range": [0.9, 1.0]}}
    expert = card_of(manifest | {"recipe": RECIPE | source})
    assert "one of several experts, for noise levels 0.9 to 1.0" in expert and "StreamingMLAPipeline" not in expert


def test_the_pipeline_comes_first_and_says_what_it_lacks(run):
    manifest = read_manifest(run / "checkpoint")
    parts = {"vae": ("diffusers", "A"), "tokenizer": ("transformers", "B"), "text_encoder": ("transformers", "C")}
    whole = card_of(manifest, components=Components(parts, Path(".")))
    assert 'video = pipe("a cat, walking").frames[0]' in whole and "does not include" not in whole
    assert whole.index("StreamingMLAPipeline") < whole.index("import mla_convert.families")
    lacking = card_of(manifest, components=Components({"vae": parts["vae"]}, Path(".")))
    assert "not include `text_encoder` and `tokenizer`: pass them" in lacking and "video = pipe" not in lacking
    assert "not include `vae`, `text_encoder` and `tokenizer`: pass them" in card_of(manifest)
    assert "StreamingMLAPipeline" not in card_of(manifest | {"source": {"model": "zoo:natural"}})
    digits = card_of(manifest | {"source": {"model": "zoo:digits"}, "recipe": None})
    assert 'video = pipe("7 at 2,1 moving up-left").frames[0]' in digits


def test_which_lora_weights_fit_is_said(run):
    manifest = read_manifest(run / "checkpoint")
    assert "LoRA weights made for the source load, because the source's projections" in card_of(manifest)
    model = manifest["model"]
    low_rank = card_of(manifest | {"model": model | {"mla": model["mla"] | {"q_lora_rank": 4}}})
    assert "load except those of `attn1.to_q`, because the other projections" in low_rank
    assert "LoRA" not in card_of(manifest | {"model": model | {"mla": None}})


def test_parts_of_the_source_are_named(run):
    manifest = read_manifest(run / "checkpoint")
    classes = {"vae": ("diffusers", "AutoencoderKLWan"), "tokenizer": ("transformers", "T5TokenizerFast")}
    referenced = card_of(manifest, components=Components(classes, repository="owner/model", revision="abc"))
    assert (
        "Other components (vae, tokenizer) are loaded from [owner/model](https://huggingface.co/owner/model)."
        in referenced
    )
    assert "Other components of the source (vae, tokenizer) are included." in card_of(
        manifest, components=Components(classes, Path("."))
    )


def test_prompts_of_samples_do_not_break_the_card():
    evidence = Evidence(samples=(Path("00-long.mp4"), Path("01-odd.mp4"), Path("unknown.mp4")))
    prompts = ["word " * 100, "a [cat]\n\n| walks", "never shown"]
    found = find_samples(evidence, {"generate": {"prompts": prompts}})
    assert [file for file, _ in found] == ["samples/00-long.mp4", "samples/01-odd.mp4", "samples/unknown.mp4"]
    long, odd, unknown = (text for _, text in found)
    assert len(long) <= 100 and long.endswith("word …")
    assert (odd, unknown) == ("a (cat) | walks", "unknown")


def code_blocks(card: str, folder: Path) -> list[str]:
    return [code.replace("PATH_OR_REPOSITORY", str(folder)) for code in re.findall(r"(?s)```python\n(.*?)```", card)]


def test_installed_code_runs(released):
    pipeline, loading, streaming = code_blocks((released / "README.md").read_text(), released)
    names: dict[str, Any] = {}
    exec(pipeline, names)
    assert names["pipe"].transformer.mla is not None and "video" not in names
    exec(loading, names)
    assert names["transformer"].dtype == torch.bfloat16
    exec(streaming, names)
    assert names["velocity"].shape == names["latents"].shape
    assert names["cache"].frames_seen == names["frames"]


def test_standalone_code_runs(run, tmp_path, monkeypatch):
    monkeypatch.setattr("mla_convert.export.release.check_standalone", lambda model, folder: None)
    export(run, tmp_path / "out", ExportConfig(form="standalone"))
    monkeypatch.setattr(remote_code, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    _, alone, installed, streaming = code_blocks((tmp_path / "out" / "README.md").read_text(), tmp_path / "out")
    velocities = []
    for loading in (alone, installed):
        names: dict[str, Any] = {}
        exec(loading, names)
        torch.manual_seed(0)
        exec(streaming, names)
        velocities.append(names["velocity"])
        modules = type(names["transformer"]).__module__
        assert modules.startswith("diffusers_modules" if loading is alone else "mla_convert")
    assert torch.equal(*velocities)


def test_equal_evidence_is_equal_bytes(run, tmp_path):
    """Including pictures, animation and card."""
    written = []
    for out in (tmp_path / "one", tmp_path / "two"):
        export(run, out, ExportConfig())
        written.append({str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()})
    one, two = written
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


def test_report_with_gaps_still_makes_a_card(run, tmp_path):
    """A report has null for numbers that are not finite."""
    gaps = REPORT | {"attention_rel_error": [None, 0.03], "velocity_rel_error": None, "plan": None}
    (run / "report.json").write_text(json.dumps(gaps))
    shutil.rmtree(run / "samples")
    export(run, tmp_path / "out", ExportConfig())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 0 | 10 | 6 | 16 |  |" in card
    assert "velocity error" not in card
    assert not (tmp_path / "out" / "figures" / "error_by_layer.png").exists()
