"""Files from elsewhere run no code, reach nothing outside their folder and fill no memory."""

from __future__ import annotations

import io
import json
import logging
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table
from torch import nn

from mla_convert.cli.output import print_error, print_result, show_notes
from mla_convert.distill import sharding
from mla_convert.distill.encode.models import text_encoder
from mla_convert.distill.progress import progress_bars
from mla_convert.errors import UserError
from mla_convert.evaluate.compare_tables import differences
from mla_convert.export.contents import list_files, local_paths
from mla_convert.export.hub_errors import explain_push_errors
from mla_convert.export.manifest import verify_files
from mla_convert.files import sha256
from mla_convert.load.pickles import PickleFile
from mla_convert.pipeline.rundir import RunDir
from mla_convert.recipe.load import load_recipe
from mla_convert.recipe.shipped import find_recipe


class Evil:
    """Creates a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


def test_code_of_a_tokenizer_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "y")
    (tmp_path / "tokenizer").mkdir()
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer" / "own.py").write_text("raise SystemExit('ran')\n")
    with (
        pytest.raises(UserError, match=r"cannot load the models of .*custom code"),
        text_encoder(tmp_path, torch.float32, torch.device("cpu")),
    ):
        pass


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("place", ["metadata", "value"])
def test_code_in_shards_is_not_run(place: str, tmp_path: Path) -> None:
    marker, folder = tmp_path / "ran", tmp_path / "shards"
    module = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    state = sharding._state(module, optimizer, None)
    if place == "value":
        state["optimizer"]["param_groups"][0]["lr"] = Evil(marker)
    dcp.save(state, checkpoint_id=folder)
    if place == "metadata":
        (folder / ".metadata").write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(UserError, match=r"needs code to be run \((io.open|optimizer.param_groups.0.lr)\)"):
        sharding.load_shards(folder, module, optimizer, None)
    assert not marker.exists()


@pytest.mark.parametrize("named", ["{}/mine", "../mine", "link/mine"])
def test_a_run_that_is_resumed_deletes_nothing_outside(named: str, tmp_path: Path) -> None:
    mine, out = tmp_path / "mine", tmp_path / "run"
    mine.write_text("mine")
    out.mkdir()
    (out / "link").symlink_to(tmp_path)
    recipe, name = load_recipe(find_recipe("demo")), named.format(tmp_path)
    step = {"outputs": {name: sha256(mine)[::-1]}, "files": {}, "paths": [name], "seconds": 0.0}
    state = {"format": 1, "finished": False, "steps": {"convert": step}, "recipe_sha256": recipe.sha256()}
    (out / "state.json").write_text(json.dumps({**state, "recipe": recipe.model_dump(mode="json")}))
    folder = RunDir(out, recipe, resume=True)
    try:
        with pytest.raises(UserError, match=f"state.json names .*{name}, which is outside; start again"):
            folder.verify(["convert"])
    finally:
        folder.close()
    assert mine.read_text() == "mine"


def test_names_reach_the_terminal_as_they_are_but_for_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    name, shown = "[red]a:cat:[/x]\x1b[2J\x9b", r"[red]a:cat:[/x]\x1b[2J\x9b"
    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    print_result(False, {}, table, f"{name}\n\tb")
    out = capsys.readouterr().out
    assert out.count(shown) == 4 and out.endswith(f"{shown}\n        b\n")
    show_notes()
    logging.getLogger("mla_convert.load").warning("%s", name)
    print_error(name)
    assert capsys.readouterr().err == f"{shown}\nerror: {shown}\n"
    stream = io.StringIO()
    with progress_bars(Console(file=stream, width=200)) as report:
        report("read", 1, 1, name)
    assert shown in stream.getvalue()


def rewritten(path: Path, structure: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """A file of `torch.save` whose pickle is `structure`."""
    torch.save({"a": torch.zeros(2)}, path)
    with zipfile.ZipFile(path) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, structure if name.endswith("data.pkl") else content)
    return path


def test_a_refused_pickle_is_not_said_to_load_without_the_check(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs code to be run \(Unsupported operand 48\), which is refused"):
        PickleFile(rewritten(tmp_path / "a.pt", b"\x80\x020."))


def test_a_compressed_pickle_is_not_expanded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a.pt is compressed, which torch.save never does"):
        PickleFile(rewritten(tmp_path / "a.pt", b"\x80\x02}." + b"0" * 1000, zipfile.ZIP_DEFLATED))


def test_a_recipe_with_aliases_is_not_expanded() -> None:
    recipe = "\n".join(["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}" for n in range(1, 9))])
    with pytest.raises(UserError, match="has YAML aliases"):
        differences([{"recipe": recipe}, {"recipe": "x: 1"}])


def test_a_password_of_the_hub_is_not_shown() -> None:
    with pytest.raises(UserError) as caught, explain_push_errors("me/model", None, None):
        raise RuntimeError("nothing at https://me:a@b@hub.example/api")
    assert str(caught.value).endswith("refused the push to me/model: nothing at https://hub.example/api")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors.index.json", "model.bin"])
def test_weights_that_no_manifest_lists_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    manifest = {"files": {"transformer/config.json": sha256(tmp_path / "transformer" / "config.json")}}
    verify_files(tmp_path, manifest, tmp_path / "transformer")
    (tmp_path / "transformer" / name).write_text("{}")
    with pytest.raises(UserError, match=f"{name} is not listed in mla_convert.json, so nothing vouches for it"):
        verify_files(tmp_path, manifest, tmp_path / "transformer")


def test_a_link_out_of_a_checkpoint_is_not_pushed_but_the_cache_is_one_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, outside = tmp_path / "out", tmp_path / "hub" / "mine"
    (root / "samples").mkdir(parents=True)
    outside.parent.mkdir()
    outside.write_text("mine")
    (root / "samples" / "a.mp4").symlink_to(outside)
    with pytest.raises(UserError, match=f"a.mp4 is a link to {outside}, outside of the checkpoint"):
        list_files(root, {"files": {}})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert set(list_files(root, {"files": {}})[0]) == {"samples/a.mp4"}
    with pytest.raises(UserError, match="outside of the checkpoint"):
        list_files(root, {"files": {__file__: "0"}})


def test_paths_of_this_machine_are_found(tmp_path: Path) -> None:
    texts = {
        "mla_convert.json": '{"source": {"model": "/home/me/wan", "url": "https://a/b"}, "data": "owner/name"}',
        "recipe.resolved.yaml": "data:\n  folder: ~/clips\n  half: 1/2\n",
        "report.html": "<td>/mnt/x</td><path d='M0 1/2'/>",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert local_paths(tmp_path / name for name in texts) == ["/home/me/wan", "/mnt/x", "~/clips"]
