"""Text embeddings of many prompts on disk, read one at a time."""

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
    """The embeddings of `prompts`, in their order, from a file or the files that `encode --prompts` wrote in a folder.

    Raises UserError for files that cannot be read, UsageError where they are of other prompts or another width.
    """

    def __init__(self, path: Path, prompts: Sequence[str], text_dim: int) -> None:
        files = prompt_files(path)
        places: list[tuple[Path, int]] = []
        for file in files:
            try:
                with safe_open(file, "pt") as tensors:
                    shape = tensors.get_slice(EMBEDS_KEY).get_shape()
            except (OSError, SafetensorError) as error:
                raise UserError(f"cannot read {EMBEDS_KEY} from {file}: {error}") from None
            if len(shape) != 3 or shape[2] != text_dim:
                raise UsageError(f"{EMBEDS_KEY} in {file} has shape {shape}; [N, L, {text_dim}] is expected")
            places += [(file, row) for row in range(shape[0])]
        if len(places) != len(prompts):
            raise UsageError(
                f"{path} has embeddings of {len(places)} prompts, VBench has {len(prompts)}; "
                "write them with --list-prompts and encode --prompts"
            )
        self._check_order(path, prompts)
        self._places = dict(zip(prompts, places, strict=True))

    def _check_order(self, path: Path, prompts: Sequence[str]) -> None:
        """The record beside the files has a digest of the prompts that they are of."""
        if not (path / PLAN).is_file():
            return
        recorded = json.loads((path / PLAN).read_text(encoding="utf-8"))
        if recorded.get("sha256") != make_plan("prompts", {}, [[prompt] for prompt in prompts])["sha256"]:
            raise UsageError(f"{path} was encoded from other prompts; write them with --list-prompts and encode again")

    def __call__(self, prompt: str) -> Tensor:
        """`[1, L, D]` in the stored dtype."""
        file, row = self._places[prompt]
        with safe_open(file, "pt") as tensors:
            found: Tensor = tensors.get_slice(EMBEDS_KEY)[row : row + 1]
        return found
