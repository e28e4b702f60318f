"""Upload of a checkpoint to the Hugging Face Hub: verified, in one commit, nothing sent twice."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, errors, get_token
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging
from huggingface_hub.utils.sha import git_hash

from .. import __version__
from ..distill.progress import Report
from ..errors import UserError
from ..files import MANIFEST, sha256
from .hub_errors import check_repo_id, explain_push_errors, name_taken
from .manifest import read_manifest, verify_files

MAIN = "main"
CARD = "README.md"
# Files below this many bytes are sent together.
SMALL = 1 << 20
# What the Hub itself puts into a new repository.
_HUB_FILES = {".gitattributes"}


@dataclass(frozen=True)
class PushConfig:
    """Where to push: `create` makes the repository and the branch `revision` where they are missing."""

    repo_id: str
    create: bool = False
    private: bool = False
    revision: str | None = None
    pull_request: bool = False
    dry_run: bool = False
    message: str | None = None


@dataclass
class Target:
    """A branch or open pull request as it is on the Hub; `commit` None for a repository that is missing."""

    revision: str = MAIN
    commit: str | None = None
    pull_request: str | None = None
    new_branch: bool = False
    tree: dict[str, RepoFile] = field(default_factory=dict)


class LocalFile(NamedTuple):
    """A file to push; `digest` is its verified sha256 where the manifest has one."""

    path: Path
    size: int
    digest: str | None

    def is_at(self, remote: RepoFile | None) -> bool:
        """Whether `remote` has the same content."""
        if remote is None or remote.size != self.size:
            return False
        if remote.lfs is not None:
            return remote.lfs.sha256 == (self.digest or sha256(self.path))
        return remote.blob_id == git_hash(self.path.read_bytes())


def push(folder: Path, config: PushConfig, report: Report | None = None) -> dict[str, Any]:
    """Bring a repository on the Hub to the state of the checkpoint in `folder`, by one commit.

    `folder` is a run folder, a checkpoint or an export; the digests in its manifest are verified first.
    Files that are there already are not sent, and files of an earlier push that are gone here are
    deleted; others stay. `report` counts bytes and names the file at work. The token comes from the
    environment or the stored login. Returns `repo_id`,
    `url`, `revision`, `commit`, `pull_request` (its URL), `created`, `uploaded`, `skipped`, `deleted`
    (names), `bytes` (of the uploaded files), `sizes` and `dry_run`. Raises UsageError for a malformed
    repository id, UserError in one line for all else.
    """
    check_repo_id(config.repo_id)
    root = find_root(folder)
    manifest = read_manifest(root)
    files = list_files(root, manifest)
    verified = sum(file.size for file in files.values() if file.digest)
    if report:
        report("verify", 0, verified)
    verify_files(root, manifest)
    token = get_token()
    if report:
        report("verify", verified, verified)
    if token is None and not config.dry_run:
        raise UserError("there is no Hub token: set HF_TOKEN, or log in with `hf auth login`")
    message = config.message or f"Upload {manifest['model']['class']} with mla-convert {__version__}"
    with _quiet_client(), explain_push_errors(config.repo_id, config.revision, token):
        api = HfApi(token=token or False, library_name="mla_convert", library_version=__version__)
        target = _find_target(api, config, message)
        missing = target.commit is None
        changed, stale = _compare(api, config.repo_id, target, files)
        created = missing or target.new_branch
        if not config.dry_run and (changed or stale or created):
            target = _prepare(api, config, target)
            _commit(api, config, target, {name: files[name] for name in changed}, stale, message, report)
    return {
        "repo_id": config.repo_id,
        "url": f"{api.endpoint}/{config.repo_id}" + ("" if target.revision == MAIN else f"/tree/{target.revision}"),
        "revision": target.revision,
        "commit": target.commit,
        "pull_request": target.pull_request,
        "created": created,
        "uploaded": changed,
        "skipped": sorted(files.keys() - set(changed)),
        "deleted": stale,
        "bytes": sum(files[name].size for name in changed),
        "sizes": {name: file.size for name, file in files.items()},
        "dry_run": config.dry_run,
    }


def find_root(folder: Path) -> Path:
    """The folder with our manifest in a run folder, checkpoint or export. Raises UserError."""
    for root in (folder, folder / "checkpoint"):
        if (root / MANIFEST).is_file():
            return root
    if not folder.exists():
        raise UserError(f"{folder} does not exist")
    raise UserError(f"{folder} has no {MANIFEST}; push what `mla-convert export` or a run wrote")


def list_files(root: Path, manifest: Mapping[str, Any]) -> dict[str, LocalFile]:
    """What is pushed, by name: every file but hidden ones and those in hidden folders."""
    files = {}
    for path in sorted(root.rglob("*")):
        inner = path.relative_to(root)
        if path.is_file() and not any(part.startswith(".") for part in inner.parts):
            name = inner.as_posix()
            files[name] = LocalFile(path, path.stat().st_size, manifest["files"].get(name))
    return files


def check_card(path: Path) -> None:
    """Ask the Hub about the card's front matter before anything large is sent. Raises UserError."""
    try:
        ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).validate()
    except ValueError as error:
        reason = str(error)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            reason = "; ".join(found["message"] for found in json.loads(reason)["errors"])
        raise UserError(f"the Hub refuses the front matter of {path}: {reason}") from None


def _find_target(api: HfApi, config: PushConfig, message: str) -> Target:
    """What is on the Hub now. Raises UserError for a name that is taken by something else."""
    target = Target(config.revision or MAIN)
    try:
        info = api.model_info(config.repo_id, revision=config.revision)
    except errors.RevisionNotFoundError:
        if not config.create:
            raise
        target.new_branch = True
        info = api.model_info(config.repo_id)
    except errors.RepositoryNotFoundError:
        if not config.create:
            raise
        target.new_branch = target.revision != MAIN
        return target
    if config.private and info.private is False:
        raise UserError(f"{config.repo_id} is public; make it private in its settings, or push without --private")
    target.commit = info.sha
    target.tree = _tree(api, config.repo_id, info.sha)
    foreign = target.tree.keys() - _HUB_FILES and MANIFEST not in target.tree
    if config.create and foreign and not target.new_branch:
        raise UserError(name_taken(config.repo_id))
    # Without a token, in a dry run, nobody can tell which pull requests are one's own.
    if config.pull_request and api.token:
        return _open_pull_request(api, config.repo_id, message) or target
    return target


def _open_pull_request(api: HfApi, repo_id: str, message: str) -> Target | None:
    """The open pull request of an earlier push, which a second one must not open again."""
    me = api.whoami()["name"]
    for found in api.get_repo_discussions(repo_id, author=me, discussion_type="pull_request"):
        if found.title == message and found.status in ("open", "draft") and found.git_reference:
            info = api.model_info(repo_id, revision=found.git_reference)
            return Target(found.git_reference, info.sha, found.url, tree=_tree(api, repo_id, info.sha))
    return None


def _tree(api: HfApi, repo_id: str, commit: str | None) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(repo_id, revision=commit, recursive=True)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _compare(api: HfApi, repo_id: str, target: Target, files: Mapping[str, LocalFile]) -> tuple[list[str], list[str]]:
    """Names of the files to send, and of those that an earlier push brought and that are gone here."""
    changed = [name for name, file in files.items() if not file.is_at(target.tree.get(name))]
    if MANIFEST not in changed or MANIFEST not in target.tree:
        return changed, []
    earlier = Path(api.hf_hub_download(repo_id, MANIFEST, revision=target.commit))
    with contextlib.suppress(ValueError, AttributeError):
        manifest = json.loads(earlier.read_text(encoding="utf-8"))
        listed = {*manifest.get("files", {}), *manifest.get("evidence", {})}
        return changed, sorted(listed & target.tree.keys() - files.keys())
    return changed, []


def _prepare(api: HfApi, config: PushConfig, target: Target) -> Target:
    """Create what is missing and asked for, and return the target as it is then."""
    if target.commit is None:
        try:
            api.create_repo(config.repo_id, private=config.private or None)
        except errors.HfHubHTTPError as error:
            if error.response.status_code == 409:
                raise UserError(name_taken(config.repo_id)) from None
            raise
        info = api.model_info(config.repo_id)
        target.commit, target.tree = info.sha, _tree(api, config.repo_id, info.sha)
    if target.new_branch:
        api.create_branch(config.repo_id, branch=target.revision, revision=target.commit)
    return target


def _commit(
    api: HfApi,
    config: PushConfig,
    target: Target,
    files: Mapping[str, LocalFile],
    stale: list[str],
    message: str,
    report: Report | None,
) -> None:
    """Send `files`, then commit them and the deletions at once; `target` is brought up to date."""
    if not files and not stale:
        return
    if CARD in files:
        check_card(files[CARD].path)
    additions = {name: CommitOperationAdd(name, file.path) for name, file in files.items()}
    for name, file in files.items():
        if file.digest:
            additions[name].upload_info.sha256 = bytes.fromhex(file.digest)
    opens = config.pull_request and target.pull_request is None
    done, total = 0, sum(file.size for file in files.values())
    small = [name for name, file in files.items() if file.size < SMALL]
    for names in ([small] if small else []) + [[name] for name in files if name not in small]:
        if report:
            report("upload", done, total, names[0] if len(names) == 1 else f"{len(names)} small files")
        # What arrives here is kept by the Hub but belongs to no commit yet.
        api.preupload_lfs_files(
            config.repo_id,
            additions=[additions[name] for name in names],
            revision=target.revision,
            create_pr=opens,
        )
        done += sum(files[name].size for name in names)
    if report:
        report("upload", done, total, "commit")
    # `upload_folder` may spread its files over several commits; this is one.
    info = api.create_commit(
        config.repo_id,
        [*(CommitOperationDelete(name) for name in stale), *additions.values()],
        commit_message=message,
        revision=target.revision,
        create_pr=opens,
        parent_commit=target.commit,
    )
    target.commit = info.oid
    if info.pr_url:
        target.pull_request, target.revision = info.pr_url, str(info.pr_revision)
    there = _tree(api, config.repo_id, info.oid)
    lost = [name for name, file in files.items() if not file.is_at(there.get(name))]
    if lost:
        raise UserError(f"the Hub did not take {lost[0]} into the commit; look for a .gitignore in {config.repo_id}")


@contextlib.contextmanager
def _quiet_client() -> Iterator[None]:
    """Keep the Hub client's own lines off: they show signed upload URLs, and bars beside ours."""
    verbosity, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            enable_progress_bars()
