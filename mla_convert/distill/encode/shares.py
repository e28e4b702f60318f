"""Deals the shards of an encoding to its processes: the first one lists the source, the others read their share.

With millions of videos, no other process lists them or keeps those of all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ...files import atomic_file
from ..waiting import Notices, wait_for_files
from .plan import WORK
from .sources import Entry
from .videos import Shard


def share_file(out: Path, deal: int, process: int) -> Path:
    """The file with the share of `process`. `deal` differs from launch to launch, so that no older file is read."""
    return out / WORK / f"share-{deal}-{process:05d}.jsonl"


def write_share(path: Path, shards: Sequence[Shard]) -> None:
    """Write `shards` for another process, one per line."""
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for shard in shards:
            entries = [[entry.name, entry.caption, str(entry.path), entry.problem] for entry in shard.entries]
            file.write(json.dumps([shard.path.name, shard.first, entries]) + "\n")


def read_share(path: Path, notices: Notices) -> list[Shard]:
    """Read the shards of this process, which may take a moment to appear on a shared file system."""
    wait_for_files([path], notices)
    shards = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            name, first, rows = json.loads(line)
            entries = [Entry(own, caption, Path(place), problem) for own, caption, place, problem in rows]
            shards.append(Shard(path.parents[1] / name, entries, first))
    return shards
