"""A model Hub on loopback that implements what the client needs and can be told to fail.

It serves the endpoints that `HfApi` uses to create, read and write model repositories, with LFS but without
xet. Start the client in a fresh process with `HubServer.environment`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LFS_BYTES = 10_000_000
NO_REPO = {"X-Error-Code": "RepoNotFound"}
WRONG_TOKEN = {"X-Error-Message": "Invalid credentials in Authorization header"}
ACCOUNTS = {"hf_OwnerSecretToken": "owner", "hf_OtherSecretToken": "other"}
OWNER, OTHER = ACCOUNTS


class Answer(Exception):
    """Ends a request with a status, a JSON body and headers."""

    def __init__(self, status: int, body: Any = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status)
        self.status, self.body, self.headers = status, body, dict(headers or {})


class Blob(NamedTuple):
    """A file of a commit."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git_oid(self) -> str:
        data = self.data
        if self.lfs:
            data = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass
class Repo:
    """Branches and pull requests by name, and the files of every commit."""

    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    pulls: list[dict[str, Any]] = field(default_factory=list)

    def commit(self, ref: str, files: Mapping[str, Blob]) -> str:
        """Make a commit of `files` the tip of `ref`."""
        number = len(self.commits).to_bytes(4, "big")
        sha = hashlib.sha1(number + repr(sorted((n, b.git_oid) for n, b in files.items())).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        return sha

    def tip(self, revision: str = "main") -> str:
        """The commit of a branch, pull request or commit. Raises Answer."""
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Answer(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Contents by name, without the files that the Hub itself adds."""
        tree = self.commits[self.tip(revision)]
        return {name: blob.data for name, blob in tree.items() if name != ".gitattributes"}


class Request(NamedTuple):
    """A request of the client; `body` is empty until it is read."""

    method: str
    path: str
    token: str | None
    query: dict[str, list[str]]
    body: bytes

    @property
    def account(self) -> str | None:
        return ACCOUNTS.get(self.token or "")


class HubServer(ThreadingHTTPServer):
    """Listens on a free port; `requests` is the log, `repos` and `objects` hold what is stored.

    `fail(method, pattern, action, times)` hands requests that match to `action(request)` first: it may
    raise Answer, return the word "drop" to have the connection cut, wait, or change what is stored.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.RLock()
        self.clear()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def clear(self) -> None:
        """Forget everything."""
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.failures: list[list[Any]] = []

    def fail(self, method: str, pattern: str, action: Callable[[Request], str | None], times: int = 1) -> None:
        self.failures.append([method, re.compile(pattern), action, times])

    def environment(self, home: str) -> dict[str, str]:
        """Variables that must be set before a client imports huggingface_hub; `home` is its HF_HOME."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": home}

    def sent(self, method: str, pattern: str = "") -> list[Request]:
        """The matching requests in the log."""
        return [request for request in self.requests if request.method == method and re.search(pattern, request.path)]

    def create(self, name: str, private: bool = False, files: Mapping[str, bytes] | None = None) -> Repo:
        """A repository as the Hub creates it, with `files` in a second commit."""
        repo = self.repos[name] = Repo(private)
        tree = {".gitattributes": Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)}
        repo.commit("main", tree)
        if files:
            repo.commit(
                "main", {**tree, **{path: Blob(data, _is_lfs(path, len(data))) for path, data in files.items()}}
            )
        return repo

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed in a test leave broken connections behind."""

    def injected(self, request: Request) -> str | None:
        """Run the first failure that matches."""
        for failure in self.failures:
            method, pattern, action, times = failure
            if times and method == request.method and pattern.search(request.path):
                failure[3] -= 1
                return action(request)
        return None

    # Every route takes the request and the groups of its pattern, unquoted.

    def create_repo(self, request: Request) -> Any:
        wanted = json.loads(request.body)
        if request.account is None or wanted["organization"] != request.account:
            raise Answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.repos:
            raise Answer(409, {"error": "You already created this model repo"})
        self.create(name, wanted.get("visibility") == "private")
        return {"url": f"{self.endpoint}/{name}", "name": name}

    def validate_yaml(self, request: Request) -> Any:
        if "license: unheard-of" in json.loads(request.body)["content"]:
            raise Answer(400, {"errors": [{"message": '"license" must be one of ...'}], "warnings": []})
        return {"errors": [], "warnings": []}

    def whoami(self, request: Request) -> Any:
        if request.account is None:
            raise Answer(401, {"error": "Invalid username or password."}, WRONG_TOKEN)
        return {"type": "user", "name": request.account}

    def model(self, request: Request, name: str, revision: str = "main") -> Any:
        repo = self.readable(request, name)
        sha = repo.tip(revision)
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        return {"id": name, "modelId": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []}

    def tree(self, request: Request, name: str, revision: str) -> Any:
        repo = self.readable(request, name)
        entries = []
        for path, blob in repo.commits[repo.tip(revision)].items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.git_oid}
            if blob.lfs:
                entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 134}
            entries.append(entry)
        return entries

    def discussions(self, request: Request, name: str) -> Any:
        author = request.query.get("author", [""])[0]
        pulls = [pull for pull in self.readable(request, name).pulls if author in ("", pull["author"]["name"])]
        return {"discussions": pulls, "count": len(pulls), "start": 0}

    def preupload(self, request: Request, name: str, revision: str) -> Any:
        repo = self.readable(request, name)
        self.check_write(request, name, "create_pr" in request.query)
        tree = repo.commits[repo.tip(revision)]
        files = []
        for file in json.loads(request.body)["files"]:
            blob = tree.get(file["path"])
            mode = "lfs" if _is_lfs(file["path"], file["size"]) else "regular"
            files.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": blob.etag if blob else None}
            )
        return {"files": files}

    def lfs_batch(self, request: Request, name: str) -> Any:
        self.readable(request, name)
        batch = json.loads(request.body)
        self.check_write(request, name, "ref" not in batch)
        objects = []
        for wanted in batch["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.objects:
                upload = {"href": f"{self.endpoint}/lfs/{wanted['oid']}?X-Amz-Signature=SecretSignature"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.endpoint}/lfs-verify"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, request: Request, oid: str) -> Any:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Answer(400, {"error": "wrong content"})
        self.objects[oid] = request.body

    def lfs_verify(self, request: Request) -> Any:
        wanted = json.loads(request.body)
        if len(self.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Answer(404, {"error": "not uploaded"})

    def branch(self, request: Request, name: str, branch: str) -> Any:
        repo = self.readable(request, name)
        self.check_write(request, name)
        if branch in repo.refs:
            raise Answer(409, {"error": "Reference already exists"})
        repo.refs[branch] = repo.tip(json.loads(request.body).get("startingPoint", "main"))

    def commit(self, request: Request, name: str, revision: str) -> Any:
        repo = self.readable(request, name)
        opens = "create_pr" in request.query
        self.check_write(request, name, opens)
        lines = [json.loads(line) for line in request.body.splitlines()]
        header = lines[0]["value"]
        parent = repo.tip(revision)
        if header.get("parentCommit", parent) != parent:
            raise Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        tree = dict(repo.commits[parent])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Answer(400, {"error": f"LFS object {value['oid']} is missing"})
                tree[value["path"]] = Blob(self.objects[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
        ref = f"refs/pr/{len(repo.pulls) + 1}" if opens else revision
        sha = repo.commit(ref, tree)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.endpoint}/{name}/commit/{sha}"}
        if opens:
            number = len(repo.pulls) + 1
            repo.pulls.append(
                {
                    "num": number,
                    "title": header["summary"],
                    "author": {"name": request.account},
                    "createdAt": "2024-01-01T00:00:00.000Z",
                    "status": "open",
                    "isPullRequest": True,
                    "repo": {"name": name, "type": "model"},
                }
            )
            answer["pullRequestUrl"] = f"{self.endpoint}/{name}/discussions/{number}"
        return answer

    def resolve(self, request: Request, name: str, revision: str, path: str) -> Any:
        repo = self.readable(request, name)
        sha = repo.tip(revision)
        blob = repo.commits[sha].get(path)
        headers = {"X-Repo-Commit": sha}
        if blob is None:
            raise Answer(404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"})
        headers["ETag"] = f'"{blob.etag}"'
        if blob.lfs:
            headers |= {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        raise Answer(200, blob.data, headers)

    def readable(self, request: Request, name: str) -> Repo:
        """The repository, if the account is allowed to see it. Raises Answer."""
        if request.token is not None and request.account is None:
            raise Answer(401, {"error": "Invalid username or password."}, WRONG_TOKEN)
        repo = self.repos.get(name)
        if repo is None or (repo.private and request.account != name.partition("/")[0]):
            raise Answer(404 if request.account else 401, {"error": "Repository not found"}, NO_REPO)
        return repo

    def check_write(self, request: Request, name: str, pull_request: bool = False) -> None:
        if request.account is None:
            raise Answer(401, {"error": "Invalid username or password."}, WRONG_TOKEN)
        if request.account != name.partition("/")[0] and not pull_request:
            raise Answer(403, {"error": "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"})


_NAME = "([^/]+/[^/]+?)"
_ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("POST", "/api/repos/create", HubServer.create_repo),
    ("POST", "/api/validate-yaml", HubServer.validate_yaml),
    ("GET", "/api/whoami-v2", HubServer.whoami),
    ("GET", f"/api/models/{_NAME}", HubServer.model),
    ("GET", f"/api/models/{_NAME}/revision/([^/]+)", HubServer.model),
    ("GET", f"/api/models/{_NAME}/tree/([^/]+)", HubServer.tree),
    ("GET", f"/api/models/{_NAME}/discussions", HubServer.discussions),
    ("POST", f"/api/models/{_NAME}/preupload/([^/]+)", HubServer.preupload),
    ("POST", f"/api/models/{_NAME}/branch/([^/]+)", HubServer.branch),
    ("POST", f"/api/models/{_NAME}/commit/([^/]+)", HubServer.commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", HubServer.lfs_batch),
    ("PUT", "/lfs/([0-9a-f]{64})", HubServer.lfs_put),
    ("POST", "/lfs-verify", HubServer.lfs_verify),
    ("GET", f"/{_NAME}/resolve/([^/]+)/(.+)", HubServer.resolve),
    ("HEAD", f"/{_NAME}/resolve/([^/]+)/(.+)", HubServer.resolve),
]


def _is_lfs(path: str, size: int) -> bool:
    return path.endswith((".safetensors", ".png", ".gif", ".mp4")) or size > LFS_BYTES


class _Handler(BaseHTTPRequestHandler):
    """Find the route, run it under the lock, and write the answer."""

    server: HubServer
    protocol_version = "HTTP/1.1"
    # Without this every answer waits 40 ms for an acknowledgement.
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        authorization = self.headers.get("authorization", "")
        token = authorization.removeprefix("Bearer ") or None
        request = Request(self.command, url.path, token, parse_qs(url.query), b"")
        if self.command == "PUT":
            # The client is in the middle of it when a failure strikes.
            self.rfile.peek(1)
        try:
            failed = self.server.injected(request)
        except Answer as raised:
            failed = raised
        if failed == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        request = request._replace(body=self.read_body())
        try:
            if isinstance(failed, Answer):
                raise failed
            with self.server.lock:
                self.server.requests.append(request)
                answer = Answer(200, self.route(request))
        except Answer as raised:
            answer = raised
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body or {}).encode()
        self.send_response(answer.status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_PUT = do_GET

    def route(self, request: Request) -> Any:
        for method, pattern, handle in _ROUTES:
            match = re.fullmatch(pattern, request.path)
            if match and method == request.method:
                return handle(self.server, request, *(unquote(group) for group in match.groups()))
        raise Answer(501, {"error": f"no route for {request.method} {request.path}"})

    def read_body(self) -> bytes:
        if self.headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print nothing: tests look at `requests` instead."""
