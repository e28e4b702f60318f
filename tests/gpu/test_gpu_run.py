"""A whole run on a GPU: the conversion equals the CPU's, and every later step finishes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="needs accelerate, a dependency of mla-convert")
pytest.importorskip("diffusers", reason="needs diffusers, a dependency of mla-convert")
pytest.importorskip("ftfy", reason="needs ftfy, a dependency of mla-convert")
pytest.importorskip("imageio", reason="needs imageio, a dependency of mla-convert")
pytest.importorskip("jinja2", reason="needs jinja2, a dependency of mla-convert")
pytest.importorskip("matplotlib", reason="needs matplotlib, a dependency of mla-convert")
pytest.importorskip("peft", reason="needs peft, a dependency of mla-convert")
pytest.importorskip("psutil", reason="needs psutil, a dependency of mla-convert")
pytest.importorskip("pydantic", reason="needs pydantic, a dependency of mla-convert")
pytest.importorskip("rich", reason="needs rich, a dependency of mla-convert")
# What else a run imports, named in the reason.
pytest.importorskip("mla_convert.pipeline", exc_type=ModuleNotFoundError)

from recipe_case import RECIPE, write_teacher

from mla_convert.convert import clip_batches, convert_source
from mla_convert.distill.objective import flow_loss
from mla_convert.export.checkpoint import load_checkpoint, save_checkpoint
from mla_convert.pipeline import run
from mla_convert.pipeline.context import Context
from mla_convert.recipe.load import parse_recipe


@pytest.mark.parametrize("layers", [1, 4])
def test_the_digits_teacher_converts_as_on_a_cpu(tmp_path: Path, layers: int) -> None:
    text = RECIPE.format(teacher="zoo:digits").replace("kv_lora_rank: 8", f"kv_lora_rank: {28 * layers}")
    recipe = parse_recipe(text, [f"convert.layers_per_latent={layers}", "convert.calibration.clips=16"])
    context = Context(recipe, tmp_path, lambda *told: None)
    losses = {}
    for device in ("cuda", "cpu"):
        batches = clip_batches(context.data.example, range(16), 4)
        found = convert_source(context.source, recipe.convert, tmp_path / device, batches, device=device)
        save_checkpoint(found.model, tmp_path / f"{device}-model", {}, tensors=found.tensors)
        losses[device] = flow_loss(load_checkpoint(tmp_path / f"{device}-model"), context.data.heldout(16))
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=5e-3)


def test_a_recipe_runs_to_its_end(tmp_path: Path) -> None:
    run(parse_recipe(RECIPE.format(teacher=write_teacher(tmp_path / "teacher"))), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "report.json").read_text())
    assert json.loads((tmp_path / "run" / "state.json").read_text())["finished"]
