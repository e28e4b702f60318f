"""Finds and reads the embedding of the negative prompt, from which guidance steers away (arXiv 2207.12598).

It also replaces the prompt of clips that lose theirs in training, because guided sampling evaluates the model on it.
Training and sampling must use the same one. The pipelines of Wan, Self-Forcing and Causal-Forcing use one long text.
The embedding of an empty text is not zeros either.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UserError

NEGATIVE = "negative.safetensors"
"""The file that `mla-convert encode` writes beside its shards."""
EMBEDS_KEY = "prompt_embeds"
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""`sample_neg_prompt` of Wan2.1's shared configuration."""


def find_negative(place: Path, given: str | Path | None = None) -> Path | None:
    """The file `given`, or else the one in the folder `place` or beside the file `place`; None if there is none."""
    if given is not None:
        return Path(given)
    beside = (place if place.is_dir() else place.parent) / NEGATIVE
    return beside if beside.is_file() else None


def read_negative(path: Path, shape: Sequence[int]) -> Tensor:
    """Read `prompt_embeds` `[L', D]` or `[1, L', D]` from `path`, zero-padded to `shape` (L, D), float32.

    Raises UserError if the file cannot be read or does not fit.
    """
    try:
        embeds = load_file(path).get(EMBEDS_KEY)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the negative prompt from {path}: {error}") from None
    if embeds is not None and embeds.ndim == 3 and len(embeds) == 1:
        embeds = embeds[0]
    tokens, width = shape
    if embeds is None or embeds.ndim != 2 or len(embeds) > tokens or embeds.shape[1] != width:
        found = "no tensor" if embeds is None else f"a {list(embeds.shape)} tensor"
        raise UserError(
            f"the negative prompt {path} has {found} {EMBEDS_KEY}, but prompts are {[tokens, width]}; encode it with "
            "the text encoder of the clips"
        )
    return F.pad(embeds.float(), (0, 0, 0, tokens - len(embeds)))
