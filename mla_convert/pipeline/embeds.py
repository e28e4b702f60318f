"""Reads the stored text embeddings of many prompts from disk, one at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..distill.encode.plan import PLAN, make_plan
from ..errors import UsageError
from ..run.sample import prompt_files
from .rollout_texts import TextFiles


class StoredEmbeds:
    """Looks up the embedding of each of `prompts` in a file, or in a folder that `encode --prompts` wrote.

    The stored embeddings are in the order of `prompts`. Raises UserError for files that cannot be read, UsageError
    if they belong to other prompts or have another width than `text_dim`.
    """

    def __init__(self, path: Path, prompts: Sequence[str], text_dim: int) -> None:
        self._texts = TextFiles(prompt_files(path), text_dim)
        if len(self._texts) != len(prompts):
            raise UsageError(
                f"{path} has embeddings of {len(self._texts)} prompts, VBench has {len(prompts)}; "
                "write them with --list-prompts and encode --prompts"
            )
        self._check_order(path, prompts)
        self._rows = {prompt: row for row, prompt in enumerate(prompts)}

    def _check_order(self, path: Path, prompts: Sequence[str]) -> None:
        """Compare the prompts with the digest of them that `encode` stores beside the files."""
        if not (path / PLAN).is_file():
            return
        recorded = json.loads((path / PLAN).read_text(encoding="utf-8"))
        if recorded.get("sha256") != make_plan("prompts", {}, [[prompt] for prompt in prompts])["sha256"]:
            raise UsageError(f"{path} was encoded from other prompts; write them with --list-prompts and encode again")

    def __call__(self, prompt: str) -> Tensor:
        """The embedding `[1, L, D]` of `prompt`, in the stored dtype."""
        return self._texts[[self._rows[prompt]]]
