"""What tells the clips of a folder from others, so that nothing goes on with clips that it did not begin with.

More clips are drawn in another order, and others of them are held out: a run that went on would be measured on clips
that it has trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Identity = Mapping[str, Any]
"""`clips` and `shards`, their numbers, and `sha256` of the shards' names and sizes in clips."""


def identity_of(folder: Path, shards: Sequence[Path], clips: Sequence[int]) -> Identity:
    """That of the `shards` of `folder` with so many `clips` each, wherever the folder lies."""
    sizes = [[path.relative_to(folder).as_posix(), count] for path, count in zip(shards, clips, strict=True)]
    digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    return {"clips": sum(clips), "shards": len(shards), "sha256": digest}


def other_clips(old: Identity | None, new: Identity | None) -> str:
    """What is different between two of them, and what to do about it."""
    before, now = (
        "clips without an end" if known is None else f"{known['clips']} clips in {known['shards']} shards"
        for known in (old, new)
    )
    there = f"{before} there, {now} here" if before != now else f"{now} of other names or sizes"
    return f"{there}; put the shards of data.folder back as they were, or begin anew with another --out"
