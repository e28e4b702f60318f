"""`mla-convert plan` of a recipe, and of latents that layers share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mla_convert.cli import main
from mla_convert.errors import nearest
from mla_convert.evaluate.geometry import PRESETS
from mla_convert.sizes import PRESET_NAMES


def plan(capsys: Any, *arguments: object) -> dict[str, Any]:
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def refused(capsys: Any, *arguments: object) -> str:
    assert main(["plan", *map(str, arguments)]) != 0
    err: str = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_a_recipe_says_its_ranks_and_its_published_model_the_shapes(capsys: Any) -> None:
    found = plan(capsys, "wan2.1-14b")
    assert found["model"] == "wan2.1-14b" and found["dense_scalars_per_token"] == 10240
    assert found["assumptions"][-1] == "shapes are those of the published wan2.1-t2v-14b; the weights are not here"
    other = plan(capsys, "wan2.1-14b", "--latent-size", "30x52", "--kv-lora-rank", 64, "--layers-per-latent", 4)
    assert 4 * other["tokens_per_frame"] == found["tokens_per_frame"]
    assert other["latent_scalars_by_layer"] == [64, 0, 0, 0] * 10


def test_a_recipe_of_a_model_that_is_here(capsys: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    lines = ["version: 1", "name: mine", "source: {model: zoo:digits}", "data: {kind: digits}"]
    layout = "convert: {position: decoupled, kv_lora_rank: 20, qk_rope_head_dim: 8}"
    recipe.write_text("\n".join([*lines, layout, "causal: {window_frames: 6, num_frames_per_block: 2}"]))
    found = plan(capsys, recipe)
    assert (found["latent_scalars_by_layer"], found["frames"], found["tokens_per_frame"]) == ([28] * 4, 6, 16)
    assert not any("published" in line for line in found["assumptions"])
    assert plan(capsys, recipe, "--qk-rope-head-dim", 4)["latent_scalars_per_token"] == 24
    assert "layers_per_latent above 1 needs position ro" in refused(capsys, recipe, "--layers-per-latent", 3)
    recipe.write_text(recipe.read_text().replace("zoo:digits", "owner/name"))
    assert "plan with --preset wan2.1-t2v-1.3b, " in refused(capsys, recipe)


def test_a_latent_that_layers_share_counts_once(capsys: Any) -> None:
    shared = plan(capsys, "--preset", "digits", "--layers-per-latent", 2)
    assert shared["latent_scalars_by_layer"] == [48, 0, 48, 0]
    assert "4 layers cannot share latents 3 at a time" in refused(
        capsys, "--preset", "digits", "--layers-per-latent", 3
    )


def test_weights_that_fill_the_gpu_are_said_to(capsys: Any) -> None:
    small = plan(capsys, "--preset", "wan2.1-t2v-14b", "--gpu", "24GB")
    assert small["max_streams_latent"] == 0
    assert small["assumptions"][0].startswith("no stream fits: the weights alone take 28.6 GB of the 24.0 GB of 24 GB")
    assert not any("no stream" in line for line in plan(capsys, "--preset", "wan2.1-t2v-14b")["assumptions"])


def test_the_help_names_every_preset() -> None:
    assert tuple(PRESETS) == PRESET_NAMES


@pytest.mark.parametrize("word", ["wan2.2-ti2v-5b", "fp8"])
def test_another_name_is_no_typing_error(word: str) -> None:
    valid = [*PRESETS, "fp16", "fp32"]
    assert nearest(word, valid) == f"valid here: {', '.join(valid)}"
    assert nearest("skyreels", valid) == "did you mean skyreels-v2-1.3b?"
