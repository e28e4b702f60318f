"""Sources on the Hub, with a stand-in on loopback: what is fetched, what is not, and refusals in one line."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote

import huggingface_hub.constants
import pytest
import torch
from load_case import change_config, equal_tensors, refusal, stock_folder, write_shards
from safetensors.torch import load_file, save

from mla_convert.families import wan_files
from mla_convert.load import AdapterConfig, load_source
from mla_convert.load.weights import WEIGHTS

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECRET = "hf_secretsecretsecret"


@pytest.fixture
def folder(tmp_path):
    return stock_folder(tmp_path / "model")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on loopback with the files in `hub.files`; `hub.errors` maps path prefixes to refusals."""
    state = SimpleNamespace(files={}, errors={}, requests=[])

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status=200, body=b"", **headers):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            path = unquote(self.path.partition("?")[0])
            state.requests.append(path)
            for beginning, (status, headers) in state.errors.items():
                if path.startswith(beginning):
                    return self.answer(status, **headers)
            if path.startswith("/api/models/owner/model/tree/"):
                tree = [
                    {"type": "file", "path": name, "size": len(body), "oid": f"{i:040x}"}
                    for i, (name, body) in enumerate(state.files.items())
                ]
                return self.answer(body=json.dumps(tree).encode(), Content_Type="application/json")
            if path.startswith("/api/models/owner/model"):
                info = {"id": "owner/model", "sha": COMMIT, "siblings": []}
                return self.answer(body=json.dumps(info).encode(), Content_Type="application/json")
            body = state.files[path.removeprefix(f"/owner/model/resolve/{COMMIT}/")]
            etag = f'"{list(state.files.values()).index(body):040x}"'
            return self.answer(body=body, ETag=etag, X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    yield state
    server.shutdown()
    server.server_close()


def test_hub_source(hub, folder):
    card = b"---\nlicense: apache-2.0\n---\n"
    hub.files = {"README.md": card, "model_index.json": b"{}", "vae/weights.safetensors": b"large"}
    hub.files |= {f"transformer/{file.name}": file.read_bytes() for file in folder.iterdir()}

    source = load_source("owner/model")

    assert (source.origin, source.revision, source.license) == ("owner/model", COMMIT, "apache-2.0")
    assert equal_tensors(source.tensors, load_file(folder / WEIGHTS))
    assert not any("vae" in path for path in hub.requests)
    assert source.provenance()["revision"] == COMMIT


@pytest.mark.parametrize("card", [b"{}", None])
def test_one_file_of_a_hub_repository(hub, folder, card):
    config, weights = ((folder / name).read_bytes() for name in ("config.json", WEIGHTS))
    hub.files = {"checkpoints/a+b/[1].safetensors": weights, "checkpoints/a+b/other.safetensors": b"large"}
    hub.files |= {"checkpoints/a+b/config.json": config, **({} if card is None else {"config.json": card})}

    source = load_source("owner/model", file="checkpoints/a+b/[1].safetensors")

    assert equal_tensors(source.tensors, load_file(folder / WEIGHTS))
    assert (source.revision, source.provenance()["file"]) == (COMMIT, "checkpoints/a+b/[1].safetensors")
    assert not any("other" in path for path in hub.requests)
    assert refusal("owner/model", file="x.pt") == "owner/model has no file x.pt on the Hub"
    assert "is not in the model's folder" in refusal("owner/model", file="../x.pt")


@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("place", ["", "transformer/", "checkpoints/14B [a]/"])
def test_shards_under_other_names(hub, folder, tmp_path, monkeypatch, place, configured):
    """The folder's index is fetched whatever its name, then the shards it names, and nothing beside or below."""
    index = "model.safetensors.index.json"
    whole = load_file(folder / WEIGHTS)
    shards = write_shards(tmp_path / "shards", index, whole)
    hub.files = {f"{place}{file.name}": file.read_bytes() for file in (tmp_path / "shards").iterdir()}
    hub.files |= {f"{place}model-00003-of-00002.safetensors": b"large", f"{place}below/{index}": b"{}"}
    hub.files |= {f"text_encoder/{index}": b"{ }", "lora.safetensors": b"large too"}
    if configured:
        hub.files |= {f"{place}config.json": (folder / "config.json").read_bytes()}
    else:
        monkeypatch.setitem(wan_files.PUBLISHED_HEADS, 24, 2)
    subfolder = place.removesuffix("/") if "14B" in place else None

    for arguments in ({"subfolder": subfolder}, {"file": f"{place}{index}"}):
        source = load_source("owner/model", **arguments)
        assert equal_tensors(source.tensors, whole)
        assert source.revision == COMMIT
        assert sorted(file.name for file in source.tensors.files()) == shards

    fetched = {path.partition(f"{COMMIT}/")[2] for path in hub.requests if "/resolve/" in path}
    assert fetched == {f"{place}{name}" for name in (index, *shards, *(["config.json"] if configured else []))}


@pytest.mark.parametrize("configured", [True, False])
def test_several_indexes_on_the_hub_are_named(hub, folder, tmp_path, configured):
    for name in ("a", "b"):
        write_shards(tmp_path / "shards", f"{name}.safetensors.index.json", load_file(folder / WEIGHTS))
    hub.files = {file.name: file.read_bytes() for file in (tmp_path / "shards").iterdir()}
    if configured:
        hub.files |= {"config.json": (folder / "config.json").read_bytes()}
    message = "has 2 indexes of weights, a.safetensors.index.json, b.safetensors.index.json; name the one to read with"
    assert message in refusal("owner/model")
    assert not any(path.endswith(".safetensors") for path in hub.requests)


def test_weights_of_a_known_name_come_before_an_index(hub, folder, tmp_path):
    index = "model.safetensors.index.json"
    write_shards(tmp_path / "shards", index, load_file(folder / WEIGHTS))
    hub.files = {file.name: file.read_bytes() for at in (tmp_path / "shards", folder) for file in at.iterdir()}
    assert [file.name for file in load_source("owner/model").tensors.files()] == [WEIGHTS]
    assert not any("-of-00002" in path for path in hub.requests)


def test_adapters_of_a_hub_repository(hub, folder):
    """The file and peft's configuration beside it are fetched, and nothing else; the commit is recorded."""
    state = load_file(folder / WEIGHTS)
    name = next(name for name in state if name.endswith("attn1.to_q.weight"))
    out, inner = state[name].shape
    module = name.removesuffix(".weight")
    matrices = {f"{module}.lora_A.weight": torch.ones(2, inner), f"{module}.lora_B.weight": torch.ones(out, 2)}
    hub.files = {f"base/{file.name}": file.read_bytes() for file in folder.iterdir()}
    hub.files |= {"lora/a.safetensors": save(matrices), "lora/adapter_config.json": b'{"lora_alpha": 8}'}
    hub.files |= {"lora/b.safetensors": b"large"}

    adapters = [AdapterConfig(file="lora/a.safetensors"), AdapterConfig(model="owner/model", file="lora/a.safetensors")]
    source = load_source("owner/model", subfolder="base", adapters=adapters)

    # Twice 8 / 2 times a sum of two ones.
    torch.testing.assert_close(source.tensors[name], state[name] + 2 * 8 / 2 * 2)
    assert [adapter["revision"] for adapter in source.adapters] == [COMMIT, COMMIT]
    assert not any("lora/b" in path for path in hub.requests)
    assert "owner/model has no file lora/c.pt" in refusal(
        "owner/model", subfolder="base", adapters=[AdapterConfig(file="lora/c.pt")]
    )


def test_hub_repository_without_a_configuration(hub):
    hub.files = {"checkpoints/self_forcing_dmd.pt": b"large", "README.md": b"-"}
    assert refusal("owner/model").endswith("name its transformer with subfolder, or its weights with file")
    assert not any(path.endswith(".pt") for path in hub.requests)


def test_hub_source_is_refused_before_its_weights_come(hub, folder):
    change_config(folder, _class_name="WanVACETransformer3DModel")
    hub.files = {f"transformer/{file.name}": file.read_bytes() for file in folder.iterdir()}
    assert "its control blocks" in refusal("owner/model")
    assert "its control blocks" in refusal("owner/model", file=f"transformer/{WEIGHTS}")
    assert not any(path.endswith(".safetensors") for path in hub.requests)


@pytest.mark.parametrize(
    ("path", "status", "headers", "reason"),
    [
        ("/api/models", 404, {"X_Error_Code": "RepoNotFound"}, "is neither a local folder nor a model on the Hub; if"),
        ("/api/models", 401, {"X_Error_Code": "RepoNotFound"}, "is neither a local folder nor a model on the Hub; if"),
        (
            "/api/models",
            401,
            {"X_Error_Message": "Invalid credentials in Authorization header"},
            "the Hub does not accept your token for owner/model; log in again",
        ),
        ("/api/models", 404, {"X_Error_Code": "RevisionNotFound"}, "owner/model has no revision 'v9' on the Hub"),
        ("/owner", 403, {"X_Error_Code": "GatedRepo"}, "owner/model is gated; accept its terms"),
        ("/owner", 403, {}, "your Hub account has no permission to read owner/model"),
        ("/api/models", 500, {}, "the Hub answered 500 for owner/model"),
    ],
)
def test_hub_refusals(hub, path, status, headers, reason):
    hub.files = {"config.json": b"{}"}
    hub.errors = {path: (status, headers)}
    message = refusal("owner/model", revision="v9")
    assert reason in message
    assert SECRET not in message


def test_hub_without_a_network(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the Hub cannot be reached" in refusal("owner/model")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids downloads" in refusal("owner/model")
