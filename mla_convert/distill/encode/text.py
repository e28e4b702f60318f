"""Writes text embeddings to safetensors files: of prompts, and of captions until their videos are encoded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ...files import atomic_file, save_tensors
from ..negative import EMBEDS_KEY
from ..progress import Report
from .config import EncodeConfig
from .models import TEXT_TOKENS, text_encoder


class Embeddings(NamedTuple):
    """A file with the embeddings of `prompts`: `prompt_embeds` `[N, 512, D]`, or `ragged` for `read_ragged`."""

    path: Path
    prompts: Sequence[str]
    ragged: bool = False


def write_embeddings(
    files: Sequence[Embeddings],
    folder: Path,
    config: EncodeConfig,
    device: torch.device,
    report: Report,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Embed the prompts of each file with the text encoder of the pipeline in `folder`.

    Loads no model if there are no prompts. `check` is called before each file.
    """
    total, done = sum(len(file.prompts) for file in files), 0
    if not total:
        return
    with text_encoder(folder, config.torch_dtype, device) as embed:
        for path, prompts, ragged in files:
            check()
            rows: list[Tensor] = []
            for start in range(0, len(prompts), config.batch_size):
                batch = embed(list(prompts[start : start + config.batch_size]))
                rows += map(_trimmed, batch) if ragged else batch
                done += len(batch)
                report("prompts", done, total)
            tensors = {str(number): row for number, row in enumerate(rows)} if ragged else _stacked(rows)
            with atomic_file(path) as temporary:
                save_tensors(tensors, temporary)


def read_ragged(path: Path) -> list[Tensor]:
    """Read the embeddings `[512, D]` of a ragged file, in order."""
    tensors = load_file(path)
    rows = (tensors[str(number)] for number in range(len(tensors)))
    return [F.pad(row, (0, 0, 0, TEXT_TOKENS - len(row))) for row in rows]


def _stacked(rows: Iterable[Tensor]) -> dict[str, Tensor]:
    return {EMBEDS_KEY: torch.stack(list(rows))}


def _trimmed(embedding: Tensor) -> Tensor:
    """An embedding without its zero padding, which is most of it."""
    used = embedding.any(dim=1).nonzero()
    return embedding[: int(used[-1]) + 1 if len(used) else 0].clone()
