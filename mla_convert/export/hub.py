"""Uploads a verified checkpoint to the Hugging Face Hub in one commit and sends no file twice."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, errors, get_token
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
    hf_raise_for_status,
    logging,
)

from .. import __version__
from ..distill.progress import Report
from ..errors import UserError
from ..files import MANIFEST
from .contents import CARD, LocalFile, list_files, local_paths
from .hub_errors import check_repo_id, explain_push_errors, name_taken, without_credentials
from .manifest import TRANSFORMER, read_manifest, verify_files

MAIN = "main"
# Files smaller than this many bytes are sent together.
SMALL = 1 << 20
# Files that the Hub itself puts into a new repository.
_HUB_FILES = {".gitattributes"}


@dataclass(frozen=True)
class PushConfig:
    """Where to push; `create` creates the repository and the branch `revision` if they are missing."""

    repo_id: str
    create: bool = False
    private: bool = False
    revision: str | None = None
    pull_request: bool = False
    dry_run: bool = False
    message: str | None = None


@dataclass
class Target:
    """Current state of a branch or open pull request on the Hub; `commit` is None if the repository is missing."""

    revision: str = MAIN
    commit: str | None = None
    pull_request: str | None = None
    new_branch: bool = False
    tree: dict[str, RepoFile] = field(default_factory=dict)


def push(folder: Path, config: PushConfig, report: Report | None = None) -> dict[str, Any]:
    """Update a repository on the Hub to the checkpoint in `folder`, in one commit.

    `folder` is a run folder, a checkpoint or an export; the digests in its manifest are verified first. Files that
    the Hub already has are not sent, nor those that `list_files` leaves out. Files of an earlier push that no longer
    exist locally are deleted; other files stay. `report` receives bytes and the current file. The token comes from the
    environment or the stored login.

    Returns `repo_id`, `url`, `revision`, `commit`, `pull_request` (its URL), `created`, `uploaded`, `skipped`,
    `deleted` and `left_out` (names), `bytes` (of the uploaded files), `sizes`, `local_paths` (in the files) and
    `dry_run`. Raises UsageError for a malformed repository id, and a one-line UserError for all other failures.
    """
    check_repo_id(config.repo_id)
    root = find_root(folder)
    manifest = read_manifest(root)
    files, left_out = list_files(root, manifest)
    verified = sum(file.size for file in files.values() if file.digest)
    if report:
        report("verify", 0, verified)
    verify_files(root, manifest, root / TRANSFORMER)
    token = get_token()
    if report:
        report("verify", verified, verified)
    if token is None and not config.dry_run:
        raise UserError("no Hub token found; set HF_TOKEN, or log in with `hf auth login`")
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
    url = f"{api.endpoint}/{config.repo_id}" + ("" if target.revision == MAIN else f"/tree/{target.revision}")
    return {
        "repo_id": config.repo_id,
        "url": without_credentials(url),
        "revision": target.revision,
        "commit": target.commit,
        "pull_request": target.pull_request and without_credentials(target.pull_request),
        "created": created,
        "uploaded": changed,
        "skipped": sorted(files.keys() - set(changed)),
        "deleted": stale,
        "bytes": sum(files[name].size for name in changed),
        "sizes": {name: file.size for name, file in files.items()},
        "left_out": left_out,
        "local_paths": local_paths(file.path for file in files.values()),
        "dry_run": config.dry_run,
    }


def find_root(folder: Path) -> Path:
    """The folder with the manifest in a run folder, checkpoint or export. Raises UserError."""
    for root in (folder, folder / "checkpoint"):
        if (root / MANIFEST).is_file():
            return root
    if not folder.exists():
        raise UserError(f"{folder} does not exist")
    raise UserError(f"{folder} has no {MANIFEST}; push what `mla-convert export` or a run wrote")


def check_card(path: Path) -> None:
    """Let the Hub validate the card's front matter before large files are sent. Raises UserError."""
    # ModelCard.validate of some releases asks huggingface.co whatever HF_ENDPOINT says.
    body = {"repoType": "model", "content": path.read_text(encoding="utf-8")}
    response = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=body)
    if response.status_code == 400:
        reason = response.text
        with contextlib.suppress(ValueError, KeyError, TypeError):
            reason = "; ".join(found["message"] for found in json.loads(reason)["errors"])
        raise UserError(f"the Hub refuses the front matter of {path}: {reason}")
    hf_raise_for_status(response)


def _find_target(api: HfApi, config: PushConfig, message: str) -> Target:
    """The current state of the target on the Hub. Raises UserError if the name is taken by something else."""
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
    # A dry run without a token cannot tell which pull requests are the user's.
    if config.pull_request and api.token:
        return _open_pull_request(api, config.repo_id, message) or target
    return target


def _open_pull_request(api: HfApi, repo_id: str, message: str) -> Target | None:
    """The open pull request of an earlier push with the same title, to continue it; None without one."""
    user = api.whoami()["name"]
    for found in api.get_repo_discussions(repo_id, author=user, discussion_type="pull_request"):
        if found.title == message and found.status in ("open", "draft") and found.git_reference:
            info = api.model_info(repo_id, revision=found.git_reference)
            return Target(found.git_reference, info.sha, found.url, tree=_tree(api, repo_id, info.sha))
    return None


def _tree(api: HfApi, repo_id: str, commit: str | None) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(repo_id, revision=commit, recursive=True)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _compare(api: HfApi, repo_id: str, target: Target, files: Mapping[str, LocalFile]) -> tuple[list[str], list[str]]:
    """The names of files to send, and of files of an earlier push that no longer exist locally."""
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
    """Create the missing repository and branch, and return the updated target."""
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
    """Send `files`, then commit them and the deletions together; updates `target`."""
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
        # The Hub stores these uploads; they belong to no commit yet.
        api.preupload_lfs_files(
            config.repo_id,
            additions=[additions[name] for name in names],
            revision=target.revision,
            create_pr=opens,
        )
        done += sum(files[name].size for name in names)
    if report:
        report("upload", done, total, "commit")
    # `upload_folder` may use several commits; this is a single one.
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
    committed = _tree(api, config.repo_id, info.oid)
    lost = [name for name, file in files.items() if not file.is_at(committed.get(name))]
    if lost:
        raise UserError(f"the Hub left {lost[0]} out of the commit; check {config.repo_id} for a .gitignore")


@contextlib.contextmanager
def _quiet_client() -> Iterator[None]:
    """Silence the Hub client's log lines, which show signed upload URLs, and its progress bars."""
    verbosity, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            enable_progress_bars()
