"""Text embeddings in safetensors files: of prompts alone, and of captions until their videos are encoded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ...files import atomic_file, save_tensors
from ..progress import Report
from .config import EncodeConfig
from .models import TEXT_TOKENS, text_encoder

EMBEDS_KEY = "prompt_embeds"


def write_embeddings(
    files: Sequence[tuple[Path, Sequence[str]]],
    folder: Path,
    config: EncodeConfig,
    device: torch.device,
    report: Report,
    ragged: bool,
) -> None:
    """Embed the prompts of each file with the text encoder of the pipeline in `folder`.

    A file holds `prompt_embeds` `[N, 512, D]`, which `generate --prompt-embeds` reads; a `ragged` one
    is for `read_ragged`. Without files no model is loaded.
    """
    total, done = sum(len(prompts) for _, prompts in files), 0
    if not total:
        return
    with text_encoder(folder, config.torch_dtype, device) as embed:
        for path, prompts in files:
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
    """The embeddings `[512, D]` of a ragged file, in order."""
    tensors = load_file(path)
    rows = (tensors[str(number)] for number in range(len(tensors)))
    return [F.pad(row, (0, 0, 0, TEXT_TOKENS - len(row))) for row in rows]


def _stacked(rows: Iterable[Tensor]) -> dict[str, Tensor]:
    return {EMBEDS_KEY: torch.stack(list(rows))}


def _trimmed(embedding: Tensor) -> Tensor:
    """An embedding without the zeros behind it, which are most of it."""
    used = embedding.any(dim=1).nonzero()
    return embedding[: int(used[-1]) + 1 if len(used) else 0].clone()
