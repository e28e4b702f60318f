"""Embeddings of many prompts that stay on disk: rows are read when they are needed, and hashed one part at a time."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..distill.latents import LatentShards
from ..distill.negative import EMBEDS_KEY
from ..errors import UserError

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_ROWS = 64


class TextFiles:
    """The embeddings in the tensors `prompt_embeds` `[n, L, D]`, or `[L, D]` of a single prompt, of `files`.

    `shape` is (N, L, D) over all files. Raises UserError for files that cannot be read, of another width than
    `text_dim`, or of different lengths.
    """

    def __init__(self, files: Sequence[Path], text_dim: int) -> None:
        self.files = files
        self._starts, self.dtype = [0], torch.float32
        lengths, dtypes = set(), []
        for file in files:
            try:
                with safe_open(file, "pt") as tensors:
                    names = list(tensors.keys())
                    if EMBEDS_KEY not in names:
                        found = ", ".join(sorted(names)) or "none"
                        raise UserError(f"{file} has no tensor {EMBEDS_KEY}; it has {found}")
                    shape = tensors.get_slice(EMBEDS_KEY).get_shape()
                    # An empty slice has the type.
                    dtypes.append(tensors.get_slice(EMBEDS_KEY)[:0].dtype)
            except (OSError, SafetensorError) as error:
                raise UserError(f"cannot read prompt embeddings from {file}: {error}") from None
            if len(shape) not in (2, 3) or shape[-1] != text_dim:
                raise UserError(f"{EMBEDS_KEY} in {file} has shape {shape}; [L, {text_dim}] is expected")
            if dtypes[-1] not in _DTYPES:
                kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
                raise UserError(f"{EMBEDS_KEY} in {file} is {str(dtypes[-1]).removeprefix('torch.')}; give {kinds}")
            lengths.add(shape[-2])
            self._starts.append(self._starts[-1] + (shape[0] if len(shape) == 3 else 1))
        if len(self) == 0:
            raise UserError(f"{files[0]} holds no prompts: {EMBEDS_KEY} has no rows; encode them again")
        if len(lengths) > 1:
            raise UserError("the files of prompts have embeddings of different lengths; encode the prompts together")
        for dtype in dtypes[:1]:
            self.dtype = dtype
        for dtype in dtypes[1:]:
            self.dtype = torch.promote_types(self.dtype, dtype)
        self.shape = (len(self), *lengths, text_dim)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, rows: list[int]) -> Tensor:
        return torch.stack([self._row(row) for row in rows]).to(self.dtype)

    def _row(self, row: int) -> Tensor:
        number = bisect.bisect_right(self._starts, row) - 1
        with safe_open(self.files[number], "pt") as tensors:
            stored = tensors.get_slice(EMBEDS_KEY)
            embedding: Tensor = stored[row - self._starts[number]] if len(stored.get_shape()) == 3 else stored[:]
        return embedding


class ClipTexts:
    """The embeddings of the first `count` of `clips`, float32; `shape` is (N, L, D)."""

    dtype = torch.float32

    def __init__(self, clips: LatentShards, count: int) -> None:
        self.clips, self.shape = clips, (count, *clips.text_shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: list[int]) -> Tensor:
        return torch.stack([self.clips.text(row) for row in rows])


class ClipCaptions:
    """The captions of `clips` by number."""

    def __init__(self, clips: LatentShards) -> None:
        self.clips = clips

    def __getitem__(self, row: int) -> str:
        return self.clips.caption(row)


class NoCaptions:
    """The captions of prompts of which only the embeddings are stored."""

    def __getitem__(self, row: int) -> str:
        return ""


def digest_of(text: Tensor | TextFiles | ClipTexts, negative: Tensor | None) -> str:
    """SHA-256 of the types, shapes and bytes of `text` `[N, L, D]` and `negative` `[L, D]`, read in parts."""
    digest = hashlib.sha256()
    for part in (text,) if negative is None else (text, negative):
        digest.update(f"{part.dtype} {list(part.shape)} ".encode())
        for start in range(0, len(part), _ROWS):
            rows = part[list(range(start, min(start + _ROWS, len(part))))]
            digest.update(rows.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
