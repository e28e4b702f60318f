"""Reads the stored text embeddings of many prompts from disk, one at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..distill.encode.plan import PLAN, make_plan
from ..distill.negative import EMBEDS_KEY
from ..errors import UsageError, UserError
from ..run.sample import prompt_files


class StoredEmbeds:
    """Looks up the embedding of each of `prompts` in a file, or in a folder that `encode --prompts` wrote.

    The stored embeddings are in the order of `prompts`. Raises UserError for files that cannot be read, UsageError
    if they belong to other prompts or have another width than `text_dim`.
    """

    def __init__(self, path: Path, prompts: Sequence[str], text_dim: int) -> None:
        files = prompt_files(path)
        rows: list[tuple[Path, int]] = []
        for file in files:
            try:
                with safe_open(file, "pt") as tensors:
                    shape = tensors.get_slice(EMBEDS_KEY).get_shape()
            except (OSError, SafetensorError) as error:
                raise UserError(f"cannot read {EMBEDS_KEY} from {file}: {error}") from None
            if len(shape) != 3 or shape[2] != text_dim:
                raise UsageError(f"{EMBEDS_KEY} in {file} has shape {shape}; [N, L, {text_dim}] is expected")
            rows += [(file, row) for row in range(shape[0])]
        if len(rows) != len(prompts):
            raise UsageError(
                f"{path} has embeddings of {len(rows)} prompts, VBench has {len(prompts)}; "
                "write them with --list-prompts and encode --prompts"
            )
        self._check_order(path, prompts)
        self._rows = dict(zip(prompts, rows, strict=True))

    def _check_order(self, path: Path, prompts: Sequence[str]) -> None:
        """Compare the prompts with the digest of them that `encode` stores beside the files."""
        if not (path / PLAN).is_file():
            return
        recorded = json.loads((path / PLAN).read_text(encoding="utf-8"))
        if recorded.get("sha256") != make_plan("prompts", {}, [[prompt] for prompt in prompts])["sha256"]:
            raise UsageError(f"{path} was encoded from other prompts; write them with --list-prompts and encode again")

    def __call__(self, prompt: str) -> Tensor:
        """The embedding `[1, L, D]` of `prompt`, in the stored dtype."""
        file, row = self._rows[prompt]
        with safe_open(file, "pt") as tensors:
            embedding: Tensor = tensors.get_slice(EMBEDS_KEY)[row : row + 1]
        return embedding
