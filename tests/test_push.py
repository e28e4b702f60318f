"""`mla-convert push` to a Hub on loopback: what arrives, what is not sent twice, and what a failure leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_case import pico_dense, pico_mla
from hub_client import Client, command_line, stop_forkserver
from hub_server import OTHER, OWNER, WRONG_TOKEN, Answer, HubServer

from mla_convert.cli import main
from mla_convert.errors import UserError
from mla_convert.export import hub
from mla_convert.export.checkpoint import load_checkpoint, save_checkpoint
from mla_convert.files import MANIFEST, sha256

NAME = "owner/model"
SHARDS = r"^/lfs/"
COMMIT = "/commit/"
CARD = "---\nlibrary_name: diffusers\n---\n# A model\n"


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """The server, and a client whose processes have its address before their first import."""
    server = HubServer()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment(str(tmp_path_factory.mktemp("home"))).items():
            patch.setenv(name, value)
        patch.setenv("MLA_CONVERT_DEBUG", "1")
        yield server, Client(tmp_path_factory.mktemp("client"))
        stop_forkserver()
    server.shutdown()


@pytest.fixture
def server(running):
    running[0].clear()
    return running[0]


@pytest.fixture
def client(running):
    return running[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A converted checkpoint with several shards and a card."""
    folder = tmp_path_factory.mktemp("saved") / "out"
    save_checkpoint(pico_mla(), folder, {}, max_shard_size="15KB")
    (folder / "README.md").write_text(CARD)
    assert len(list(folder.rglob("*.safetensors"))) >= 3
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shards(folder: Path) -> dict[str, Path]:
    """The weight files by digest."""
    return {sha256(path): path for path in folder.rglob("*.safetensors")}


def another(saved: Path, folder: Path, seed: int = 1, shard_size: str = "15KB") -> Path:
    """A checkpoint with different weights."""
    save_checkpoint(pico_mla(seed), folder, {}, max_shard_size=shard_size)
    shutil.copy(saved / "README.md", folder)
    return folder


def test_push_uploads_everything_in_one_commit(server, client, saved):
    result = client.json(saved, NAME, "--create", "--private")

    repo = server.repos[NAME]
    assert repo.private
    assert repo.files() == contents(saved)
    assert len(server.sent("POST", COMMIT)) == 1
    assert len(server.sent("PUT", SHARDS)) == len(shards(saved))
    assert result["repo_id"] == NAME
    assert result["url"] == f"{server.endpoint}/{NAME}"
    assert result["commit"] == repo.refs["main"]
    assert result["created"]
    assert result["uploaded"] == sorted(contents(saved))
    assert result["skipped"] == result["deleted"] == []
    assert result["bytes"] == sum(map(len, contents(saved).values()))
    assert result["pull_request"] is None


def test_second_push_has_nothing_to_do(server, client, saved):
    first = client.json(saved, NAME, "--create")
    before = len(server.repos[NAME].commits)
    server.requests.clear()

    again = client.push(saved, NAME, "--create")
    assert again.code == 0
    assert again.out.startswith("nothing to do: ")
    result = client.json(saved, NAME)
    assert result["uploaded"] == []
    assert result["skipped"] == first["uploaded"]
    assert result["commit"] == first["commit"]
    assert len(server.repos[NAME].commits) == before
    # Reading alone was needed.
    assert {request.method for request in server.requests} == {"GET"}


def test_only_what_changed_is_sent_and_what_is_gone_is_deleted(server, client, saved, tmp_path):
    other = another(saved, tmp_path / "other", seed=0, shard_size="1GB")
    server.create(NAME)
    client.json(saved, NAME)
    # Not from a push, so none of our business.
    tree = server.repos[NAME].commits[server.repos[NAME].tip()]
    server.repos[NAME].commit("main", {**tree, "LICENSE": tree["README.md"]})

    result = client.json(other, NAME)

    gone = sorted(contents(saved).keys() - contents(other).keys())
    assert any(name.endswith(".index.json") for name in gone)
    assert result["deleted"] == gone
    assert "README.md" in result["skipped"]
    assert "transformer/config.json" in result["skipped"]
    assert server.repos[NAME].files() == {**contents(other), "LICENSE": CARD.encode()}
    assert len(server.sent("POST", COMMIT)) == 2


def test_dry_run_sends_nothing(server, client, saved, tmp_path):
    listed = client.push(saved, NAME, "--create", "--dry-run", token=None)
    assert listed.code == 0
    assert "transformer/config.json" in listed.out
    assert f"would upload {len(contents(saved))} files" in listed.out
    assert server.repos == {}
    client.json(saved, NAME, "--create")
    changed = another(saved, tmp_path / "changed")
    before = dict(server.repos[NAME].refs)
    server.requests.clear()

    result = client.json(changed, NAME, "--dry-run")

    assert result["dry_run"]
    assert set(result["uploaded"]) == {MANIFEST, *(name for name in contents(saved) if name.endswith(".safetensors"))}
    assert result["sizes"] == {name: len(data) for name, data in contents(changed).items()}
    assert server.repos[NAME].refs == before
    assert {request.method for request in server.requests} <= {"GET", "HEAD"}


def test_what_the_manifest_does_not_list_stays_here(server, client, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "run" / "checkpoint")
    (folder / ".env").write_text("PASSWORD=1")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "note").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    told = {"LICENSE.txt": b"free", "NOTICE": b"by me", "recipe.resolved.yaml": b"data:\n  folder: /data/me/clips\n"}
    for name, text in told.items():
        (folder / name).write_bytes(text)

    out = client.push(tmp_path / "run", NAME, "--create").out

    assert "left out, as mla_convert.json does not list them: notes.txt\n" in out
    assert "the files name paths of this machine: /data/me/clips\n" in out
    assert server.repos[NAME].files() == contents(saved) | told


def test_upload_that_breaks_goes_on_where_it_stopped(server, client, saved):
    server.create(NAME, files={"notes.txt": b"old"})
    *first, last = sorted(shards(saved))

    def cut(request) -> str:
        deadline = time.monotonic() + 20
        while len(server.objects) < len(first) and time.monotonic() < deadline:
            time.sleep(0.01)
        return "drop"

    server.fail("PUT", last, cut, times=100)

    broken = client.push(saved, NAME, patient=False)

    assert broken.code == 1
    assert "the connection to http://127.0.0.1" in broken.error
    assert "run the same command again" in broken.error
    assert server.repos[NAME].files() == {"notes.txt": b"old"}
    assert server.sent("POST", COMMIT) == []
    assert server.objects.keys() == set(first)
    server.failures.clear()
    server.requests.clear()

    client.json(saved, NAME)

    assert [request.path for request in server.sent("PUT", SHARDS)] == [f"/lfs/{last}"]
    assert server.repos[NAME].files() == {**contents(saved), "notes.txt": b"old"}


def test_connection_lost_once_is_tried_again(server, client, saved):
    server.fail("PUT", SHARDS, lambda request: "drop")
    client.json(saved, NAME, "--create")
    assert server.repos[NAME].files() == contents(saved)


@pytest.mark.parametrize(
    ("method", "pattern", "after"),
    [("PUT", SHARDS, "old"), ("POST", COMMIT, "old"), ("GET", "/tree/[0-9a-f]{40}$", "old"), ("GET", "/tree/", "new")],
)
def test_kill_leaves_the_old_state_or_the_new_one(server, client, saved, tmp_path, method, pattern, after):
    changed = another(saved, tmp_path / "changed")
    client.json(saved, NAME, "--create")
    commits = len(server.repos[NAME].commits)
    reached, go_on = threading.Event(), threading.Event()

    def wait(request) -> str | None:
        # Only what comes after the commit tells of the new state.
        if after == "new" and len(server.repos[NAME].commits) == commits:
            return None
        reached.set()
        go_on.wait(20)
        # The request of a dead client: whether it still got through is up to the network.
        return "drop"

    server.fail(method, pattern, wait, times=100)
    child = client.start(command_line, ["push", str(changed), NAME], OWNER)
    assert reached.wait(20)
    child.kill()
    child.join()
    go_on.set()

    assert client.finish(child).code == -signal.SIGKILL
    state = contents({"old": saved, "new": changed}[after])
    assert server.repos[NAME].files() == state
    server.failures.clear()
    client.json(changed, NAME)
    assert server.repos[NAME].files() == contents(changed)
    # The repository has never been anything else.
    tips = list(server.repos[NAME].commits)[1:]
    assert [server.repos[NAME].files(tip) for tip in tips] == [contents(saved), contents(changed)]


def test_interrupt_is_one_line(server, client, saved):
    server.create(NAME)
    child = None

    def interrupt(request) -> None:
        os.kill(child.pid, signal.SIGINT)
        time.sleep(0.3)

    server.fail("PUT", SHARDS, interrupt)
    child = client.start(command_line, ["push", str(saved), NAME], OWNER)
    result = client.finish(child)
    assert result.code == 130
    assert result.err.strip().splitlines()[-1] == "error: interrupted"
    assert server.repos[NAME].files() == {}


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        ([NAME], None, "no Hub token found"),
        ([NAME], "hf_WrongSecretToken", "the Hub does not accept your token"),
        ([NAME], OTHER, "your token may not write to owner/model"),
        (["owner/absent"], OWNER, "your token can access no model owner/absent on the Hub"),
        (["somebody/new", "--create"], OWNER, "your token may not write to somebody/new"),
        (["owner/hidden", "--create"], OTHER, "your token may not write to owner/hidden"),
        ([NAME, "--create"], OWNER, "owner/model already exists on the Hub"),
        ([NAME, "--private"], OWNER, "owner/model is public"),
        ([NAME, "--revision", "absent"], OWNER, "owner/model has no branch 'absent'"),
    ],
)
def test_refusals_are_one_line_and_change_nothing(server, client, saved, arguments, token, message):
    server.create(NAME, files={"weights.bin": b"mine"})
    server.create("owner/hidden", private=True)

    result = client.push(saved, *arguments, token=token)

    assert result.code == 1
    assert result.error.startswith(message)
    assert server.repos.keys() == {NAME, "owner/hidden"}
    assert server.repos[NAME].files() == {"weights.bin": b"mine"}
    assert server.objects == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model"], "'model' is not a repository id; write OWNER/NAME"),
        (["a/b/c"], "'a/b/c' is not a repository id"),
        (["own er/model"], "'own er/model' is not a repository id"),
        (["owner/my--model"], "'owner/my--model' is not a repository id"),
        ([NAME, "--revision", "x", "--pull-request"], "give --revision or --pull-request, not both"),
        ([NAME, "--message", " "], "--message is empty"),
        ([NAME, "--token", "hf_x"], "No such option: --token"),
    ],
)
def test_bad_command_lines(capsys, saved, arguments, message):
    assert main(["push", str(saved), *arguments]) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_name_taken_while_we_look(server, client, saved):
    """The repository appears between our check and its creation, or was hidden from us."""
    server.fail("POST", "/api/repos/create", lambda request: server.create(NAME) and None)
    assert client.push(saved, NAME, "--create").error.startswith("owner/model already exists on the Hub")


@pytest.mark.parametrize("status", [409, 412])
def test_revision_conflict(server, client, saved, status):
    server.create(NAME)

    def move(request) -> None:
        tree = server.repos[NAME].commits[server.repos[NAME].tip()]
        server.repos[NAME].commit("main", {**tree, "README.md": tree[".gitattributes"]})
        if status == 409:
            raise Answer(409, {"error": "conflict"})

    server.fail("POST", COMMIT, move)
    conflict = client.push(saved, NAME)
    assert conflict.error.startswith("owner/model changed on the Hub during the push and nothing was committed")
    assert server.repos[NAME].files().keys() == {"README.md"}
    server.requests.clear()

    client.json(saved, NAME)

    assert server.repos[NAME].files() == contents(saved)
    assert server.sent("PUT", SHARDS) == []


@pytest.mark.parametrize(
    ("method", "pattern", "status", "headers", "message"),
    [
        ("POST", "/preupload/", 401, WRONG_TOKEN, "the Hub does not accept your token"),
        ("PUT", SHARDS, 403, {}, "your token may not write to owner/model"),
        ("POST", COMMIT, 413, {}, "the Hub answered 413 for owner/model"),
        (
            "POST",
            COMMIT,
            400,
            {"X-Error-Message": f"no: {OWNER}"},
            "the Hub refuses the push to owner/model: no: (token)",
        ),
    ],
)
def test_failures_on_the_way_are_one_line(server, client, saved, method, pattern, status, headers, message):
    def refuse(request) -> None:
        raise Answer(status, {}, headers)

    server.create(NAME)
    server.fail(method, pattern, refuse, times=100)
    assert client.push(saved, NAME).error.startswith(message)
    assert server.repos[NAME].files() == {}


def test_card_that_the_hub_refuses(server, client, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "bare")
    (folder / "README.md").write_text(CARD.replace("library_name: diffusers", "license: unheard-of"))
    server.create(NAME)
    line = client.push(folder, NAME).error
    assert line.startswith("the Hub refuses the front matter of ")
    assert line.endswith('README.md: "license" must be one of ...')
    assert server.objects == {}


def test_branch_is_made_when_asked(server, client, saved):
    server.create(NAME, files={"weights.bin": b"mine"})

    result = client.json(saved, NAME, "--revision", "mla", "--create")

    repo = server.repos[NAME]
    assert result["revision"] == "mla"
    assert result["url"] == f"{server.endpoint}/{NAME}/tree/mla"
    assert repo.files("mla") == {**contents(saved), "weights.bin": b"mine"}
    assert repo.files() == {"weights.bin": b"mine"}
    assert client.json(saved, NAME, "--revision", "mla")["uploaded"] == []


def test_pull_request_is_opened_once(server, client, saved, tmp_path):
    server.create(NAME, files={"weights.bin": b"mine"})

    first = client.json(saved, NAME, "--pull-request", token=OTHER)
    again = client.json(saved, NAME, "--pull-request", token=OTHER)
    changed = another(saved, tmp_path / "changed")
    third = client.json(changed, NAME, "--pull-request", token=OWNER)

    repo = server.repos[NAME]
    assert first["pull_request"] == again["pull_request"] == f"{server.endpoint}/{NAME}/discussions/1"
    assert first["revision"] == "refs/pr/1"
    assert again["uploaded"] == []
    # Another account opens its own.
    assert third["revision"] == "refs/pr/2"
    assert repo.files() == {"weights.bin": b"mine"}
    assert repo.files("refs/pr/1") == {**contents(saved), "weights.bin": b"mine"}
    assert repo.files("refs/pr/2") == {**contents(changed), "weights.bin": b"mine"}


def test_folders_that_are_not_ours_or_not_whole(server, client, saved, tmp_path):
    assert "has no mla_convert.json" in client.push(tmp_path, NAME, "--create").error
    assert client.push(tmp_path / "absent", NAME).error.endswith("absent does not exist")
    broken = shutil.copytree(saved, tmp_path / "broken")
    weights = next(broken.rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert f"{weights.name} has changed: its sha256 differs" in client.push(broken, NAME, "--create").error
    assert server.requests == []


def test_no_network(client, saved, monkeypatch):
    """This process does not have the server's address and cannot reach a network; nothing listens on port 9."""
    monkeypatch.setattr(hub.HfApi, "__init__", _nowhere)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", OWNER)
    with pytest.raises(UserError, match="check the network") as caught:
        hub.push(saved, hub.PushConfig(NAME))
    assert "\n" not in str(caught.value)


def load_from_hub(arguments: list[str]) -> int:
    """Load with our class by repository ID, and print a digest of every tensor."""
    import hashlib

    import diffusers

    from mla_convert.families.wan import MLAWanTransformer3DModel

    name, revision = arguments
    keywords = {"subfolder": "transformer", "revision": revision}
    model = MLAWanTransformer3DModel.from_pretrained(name, **keywords)
    auto = diffusers.AutoModel.from_pretrained(name, **keywords)
    digests = [
        {key: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for key, tensor in loaded.state_dict().items()}
        for loaded in (model, auto)
    ]
    json.dump(digests, sys.stdout)
    return 0


def test_pushed_weights_load_by_repository_id(server, client, saved):
    import hashlib

    commit = client.json(saved, NAME, "--create", "--private")["commit"]

    loaded = client.finish(client.start(load_from_hub, [NAME, commit], OWNER)).json

    state = load_checkpoint(saved).state_dict()
    expected = {key: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for key, tensor in state.items()}
    assert loaded == [expected, expected]
    assert all(tensor.dtype == torch.float32 for tensor in state.values())


def test_pushed_dense_model_is_a_source(server, client, saved, tmp_path):
    """The other commands read what push wrote, by repository ID."""
    save_checkpoint(pico_dense(), tmp_path / "dense", {})
    client.json(tmp_path / "dense", NAME, "--create")

    line = ["plan", NAME, "--frames", "6", "--kv-lora-rank", "10", "--qk-rope-head-dim", "0", "--json"]
    plan = client.finish(client.start(command_line, line, OWNER)).json

    assert plan["dense_scalars_per_token"] == 2 * 2 * 12
    assert plan["latent_scalars_per_token"] == 10


_init = hub.HfApi.__init__


def _nowhere(self, **keywords: Any) -> None:
    _init(self, endpoint="http://127.0.0.1:9", **keywords)
