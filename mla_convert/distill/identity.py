"""Identifies the set of clips in a folder, so that a run resumes only with the clips that it began with.

A different number of clips changes the order and which clips are held out. A resumed run would then be measured on
clips that it has trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Identity = Mapping[str, Any]
"""The numbers of `clips` and `shards`, and the `sha256` of the shards' names and sizes in clips."""


def identity_of(folder: Path, shards: Sequence[Path], clips: Sequence[int]) -> Identity:
    """The identity of the `shards` of `folder` with `clips` clips each; it does not depend on the folder's path."""
    sizes = [[path.relative_to(folder).as_posix(), count] for path, count in zip(shards, clips, strict=True)]
    digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    return {"clips": sum(clips), "shards": len(shards), "sha256": digest}


def other_clips(old: Identity | None, new: Identity | None) -> str:
    """The message for two different identities: what changed, and the remedy."""
    before, now = (
        "generated clips" if identity is None else f"{identity['clips']} clips in {identity['shards']} shards"
        for identity in (old, new)
    )
    change = f"{before} then, {now} now" if before != now else f"{now} with other names or sizes"
    return f"{change}; restore the shards of data.folder, or start over with another --out"
