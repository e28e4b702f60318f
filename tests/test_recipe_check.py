"""`mla-convert recipes check` of a recipe whose source is not on this machine: all that it names here is checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mla_convert.cli import main
from mla_convert.distill.clip_shards import Clip, write_latents
from mla_convert.errors import UserError
from mla_convert.load.hub import is_hub_id
from mla_convert.load.locate import locate

RECIPE = """
version: 1
name: remote
source: {model: owner/name}
data: {kind: latents, folder: DATA, latents: normalized, heldout: 1}
convert: {init: svd, kv_lora_rank: 8}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    clips = [Clip(torch.zeros(4, 3, 4, 6), torch.zeros(5, 8), name=f"{number}") for number in range(2)]
    write_latents(tmp_path / "clips", clips, 2)
    path = tmp_path / "remote.yaml"
    path.write_text(RECIPE.replace("DATA", str(tmp_path / "clips")))
    return path


def check(capsys: Any, recipe: Path, *changes: str) -> tuple[int, str, str]:
    code = main(["recipes", "check", str(recipe), *(word for change in changes for word in ("--set", change))])
    return (code, *capsys.readouterr())


def test_what_is_taken_for_a_hub_id_is_said(capsys: Any, recipe: Path) -> None:
    code, out, _ = check(capsys, recipe, "source.components=owner/parts")
    assert code == 0 and "its samples are latents of 4x6" in out
    for key, name in (("source.model", "owner/name"), ("source.components", "owner/parts")):
        assert f"{key}: no such folder here as {name}, so it is taken as a Hub ID; not checked" in out.splitlines()
    assert main(["recipes", "check", str(recipe), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["source_checked"], found["latent_size"], len(found["unchecked"])) == (False, [4, 6], 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("source.model=ckpts/sf.pt", "source.model: ckpts/sf.pt is neither an existing path nor a Hub ID"),
        ("source.components=ckpts/vae.pth", "source.components: ckpts/vae.pth is neither an existing path"),
        ("data.folder=nowhere", "no .parquet shards in nowhere"),
        ("data.heldout=2", "heldout: 2 leaves none to train on"),
        ("data.skip=[5]", "has no clip 5"),
        ("data.negative_embeds=none.safetensors", "cannot read the negative prompt from none.safetensors"),
        (
            "data={kind: rollouts, heldout: 1, rollouts: {clips: 2, prompt_embeds: nowhere}}",
            "data.rollouts.prompt_embeds: nowhere does not exist",
        ),
    ],
)
def test_what_is_wrong_here_is_found_without_the_source(capsys: Any, recipe: Path, change: str, message: str) -> None:
    code, _, err = check(capsys, recipe, change)
    assert code in (1, 2) and message in err and err.splitlines()[-1].startswith("error: ")


def test_components_without_a_text_encoder_are_named(capsys: Any, recipe: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    assert check(capsys, recipe, f"source.components={parts}")[0] == 0
    code, _, err = check(capsys, recipe, f"source.components={parts}", "generate.prompts=[a cat]")
    assert code == 1 and f"{parts} has no tokenizer" in err


@pytest.mark.parametrize("name", ["ckpts/sf.pt", "ckpts/a.pth", "a/b.safetensors", "a/b.ckpt", "a/b.gguf", "a/b.bin"])
def test_a_weights_file_that_is_not_there_is_no_hub_id(name: str) -> None:
    assert not is_hub_id(name) and is_hub_id(Path(name).with_suffix("").as_posix())
    with pytest.raises(UserError, match=f"{name} does not exist; give a folder"):
        locate(name, None, None, None)
