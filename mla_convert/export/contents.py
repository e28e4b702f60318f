"""Chooses which files of a checkpoint are pushed, and finds what they tell of the machine."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import constants
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from ..errors import UserError
from ..files import MANIFEST, sha256
from .manifest import EVIDENCE

CARD = "README.md"
_LICENSES = ("license", "licence", "notice")
# Absolute or in a home folder, in quotes or after a space.
_PATH = re.compile(r"""(?<=["'\s>])(?:~/|/[A-Za-z_.])[^\s"'<>,;)]*""")


class LocalFile(NamedTuple):
    """A file to push; `digest` is its verified sha256 if the manifest lists one."""

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


def list_files(root: Path, manifest: Mapping[str, Any]) -> tuple[dict[str, LocalFile], list[str]]:
    """The files to push by name, and the names of files in `root` that are left out; both without hidden files.

    Pushed are the manifest, what it lists, the evidence, the card, and licenses and notices beside it. Raises UserError
    for a link to a file that is neither in `root` nor in the Hub's cache.
    """
    here = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    evidence = {name for name in here if name.partition("/")[0] in EVIDENCE}
    licenses = {name for name in here if "/" not in name and name.lower().startswith(_LICENSES)}
    listed = {MANIFEST, CARD, *licenses, *manifest["files"], *evidence}
    files = {}
    for name in filter(_is_visible, sorted(listed)):
        path = root / name
        if not path.is_file():
            continue
        real = path.resolve()
        if not any(real.is_relative_to(Path(place).resolve()) for place in (root, constants.HF_HUB_CACHE)):
            raise UserError(f"{path} is a link to {real}, outside of the checkpoint; put the file itself there")
        files[name] = LocalFile(path, path.stat().st_size, manifest["files"].get(name))
    return files, sorted(filter(_is_visible, here - listed))


def _is_visible(name: str) -> bool:
    return not any(part.startswith(".") for part in name.split("/"))


def local_paths(files: Iterable[Path]) -> list[str]:
    """The absolute paths, and those in a home folder, in the manifest, the card and the evidence."""
    told = [file for file in files if file.name in (MANIFEST, CARD, *EVIDENCE)]
    return sorted(
        {found for file in told for found in _PATH.findall(file.read_text(encoding="utf-8", errors="replace"))}
    )
