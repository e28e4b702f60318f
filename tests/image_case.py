"""Tiny image-to-video models, dense and converted, and their conditions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pico
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from wan_pipeline_case import wan_parts

from mla_convert.convert import ConvertConfig, convert_model
from mla_convert.export.manifest import family_of

HEIGHT, WIDTH = 4, 6
CHANNELS = 4
# Wan2.2's: latents of 4 channels beside a mask of 4 and an image of 4; Wan2.1's also read CLIP tokens.
WAN22 = {"in_channels": 12, "out_channels": CHANNELS}
WAN21 = {**WAN22, "image_dim": 8, "added_kv_proj_dim": 24}
# Wan2.1 tells text from image tokens by the text's 512.
TEXT_TOKENS = {"wan2.1": 512, "wan2.2": 3}
KINDS: dict[str, dict[str, Any]] = {"wan2.1": WAN21, "wan2.2": WAN22}


def model(kind: str = "wan2.1", **changes: Any) -> Any:
    return pico.dense_model(**{**KINDS[kind], **changes})


def converted(dense: Any, **changes: Any) -> Any:
    """Convert from the weights alone, as image-to-video models are converted."""
    settings = {"position": "rotate_on_read", "kv_lora_rank": 20, "init": "svd", **changes}
    return convert_model(family_of(type(dense)), dense, ConvertConfig(**settings))


def text(kind: str = "wan2.1", batch: int = 1, seed: int = 1) -> Tensor:
    return torch.randn(batch, TEXT_TOKENS[kind], 8, generator=torch.Generator().manual_seed(seed))


def conditions(kind: str = "wan2.1", frames: int = 8, batch: int = 1, seed: int = 2) -> dict[str, Tensor]:
    """All conditions of a model of this kind."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(batch, 8, frames, HEIGHT, WIDTH, generator=generator)
    tokens = torch.randn(batch, 5, 8, generator=generator)
    return {"image_latents": image} | ({"encoder_hidden_states_image": tokens} if kind == "wan2.1" else {})


def latents(frames: int = 8, batch: int = 1, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Noisy latents and their timesteps."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, CHANNELS, frames, HEIGHT, WIDTH, generator=generator)
    return noise, 1000 * torch.rand(batch, frames, generator=generator)


def picture(size: tuple[int, int] = (48, 32), seed: int = 0) -> Image.Image:
    """A picture of noise; `size` is width and height."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def write_pipeline(folder: Path) -> Path:
    """A pipeline as published with Wan2.1's image-to-video models, with tiny random parts and no transformer."""
    parts = wan_parts()
    vision = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    clip = CLIPVisionModel(CLIPVisionConfig(**vision, image_size=28, patch_size=14))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28)
    WanImageToVideoPipeline(*parts, None, processor, clip).save_pretrained(folder)
    return folder
