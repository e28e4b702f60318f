"""Builds the models and clips of a recipe from their shapes alone, with random weights or on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..convert.config import ConvertConfig
from ..convert.initialize import LayerInit
from ..convert.limits import planned_ranks
from ..convert.state import mla_config
from ..distill.data import Batch
from ..distill.footprint import ClipShape
from ..distill.identity import Identity
from ..evaluate.geometry import PAPER_SHARE
from ..families.base import Family, attention_geometry
from ..families.image import needed_conditions
from ..mla.image import IMAGE, TOKENS

CLIP_TOKENS = 257


def dense_of(family: Family, config: Mapping[str, Any], device: str = "meta") -> Any:
    """The dense model of `config`."""
    with torch.device(device):
        return family.dense_class.from_config(config)


def student_of(
    family: Family, config: Mapping[str, Any], dense: Any, convert: ConvertConfig, device: str = "meta"
) -> Any:
    """The model converted from `dense`, the model of `config`; with a budget, every layer gets the mean rank."""
    mla = _mla(family, dense, convert)
    with torch.device(device):
        return family.mla_class.from_config({**config, "mla": mla})


def _mla(family: Family, dense: Any, convert: ConvertConfig) -> dict[str, Any]:
    """The `mla` section of the model converted from `dense`."""
    layers, head_dim = dense.config.num_layers, dense.config.attention_head_dim
    scalars = 2 * dense.config.num_attention_heads * head_dim
    ranks = planned_ranks(attention_geometry(dense.config), dense.rotary_table().axes, convert).fitted
    if convert.budget is not None:
        mean = convert.budget.scalars(scalars) or scalars * PAPER_SHARE
        ranks = [max(1, convert.layers_per_latent * (round(mean) - convert.cached_key))] * layers
    shared = convert.qk_rope_head_dim // 2
    plan = LayerInit(list(range(shared)), list(range(shared, head_dim // 2)), {})
    return mla_config(convert, ranks, [plan] * layers, head_dim).model_dump(mode="json")


class NoiseClips:
    """Data whose clips are noise in the shape `clip`, with the image conditions that a model of `config` reads."""

    identity: Identity | None = None

    def __init__(self, clip: ClipShape, config: Mapping[str, Any], size: int | None = None) -> None:
        self.clip, self.size, needed = clip, size, needed_conditions(config)
        image_channels = int(config.get("in_channels") or clip.channels) - clip.channels
        shapes = {
            IMAGE: (image_channels, clip.frames, clip.height, clip.width),
            TOKENS: (CLIP_TOKENS, config.get("image_dim") or 0),
        }
        self.images = {name: shapes[name] for name in needed}

    @property
    def negative(self) -> Tensor:
        return torch.zeros(self.clip.text_tokens, self.clip.text_dim)

    def example(self, index: int) -> Batch:
        generator, clip = torch.Generator().manual_seed(index), self.clip
        text: Tensor = torch.randn(clip.text_tokens, clip.text_dim, generator=generator)
        shape = (clip.channels, clip.frames, clip.height, clip.width)
        latents = torch.randn(shape, generator=generator)
        images = {name: torch.randn(image, generator=generator) for name, image in self.images.items()}
        return {"latents": latents, "encoder_hidden_states": text, **images}

    def heldout(self, count: int | None = None) -> Batch:
        raise NotImplementedError("clips of noise have no held-out part")
