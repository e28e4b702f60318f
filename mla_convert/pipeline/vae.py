"""Finds and loads the VAE of a run's source, and counts its bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from ..distill.encode.models import load_vae
from ..errors import UsageError
from ..load import Source
from ..load.hub import is_hub_id
from ..run.decode_memory import decoding_bytes
from ..run.latents import check_vae, latent_scale
from ..run.parts import PICTURES, find_parts, parts_here


def source_vae(source: Source, checkpoint: Path, device: torch.device | str = "cpu") -> Any:
    """Load the VAE that belongs to a `checkpoint` of `source`, in float32. Raises UserError for none or a wrong one."""
    parts = find_parts(checkpoint, PICTURES, source.components)
    if parts is None:
        raise _missing(source.origin)
    vae = load_vae(parts, device)
    check_vae(vae, source.config, f"the VAE in {parts}", "set source.components")
    return vae


def check_source_vae(source: Source) -> None:
    """Raise UsageError if a model makes pixels or has no VAE; one on the Hub is not looked for yet."""
    if latent_scale(source.config).spatial == 1:
        raise UsageError("reencode_first: this model makes pixels, which no VAE has to encode; leave it out")
    origin = source.components or source.origin
    on_hub = is_hub_id(origin) and not Path(origin).expanduser().exists()
    if not on_hub and parts_here(origin, PICTURES) is None:
        raise _missing(origin)


def vae_config(origin: str) -> dict[str, Any] | None:
    """The configuration of the VAE of the pipeline `origin`; None if it is not on this machine."""
    parts = parts_here(origin, PICTURES)
    if parts is None:
        return None
    config: dict[str, Any] = json.loads((parts / PICTURES[0] / "config.json").read_text(encoding="utf-8"))
    return config


def reencoding_bytes(config: dict[str, Any], height: int, width: int) -> int:
    """Bytes of decoding latents of `height x width` and encoding a frame with the VAE of `config`, in float32.

    Encoding one frame takes less than decoding a latent frame of several, and comes after it.
    """
    with torch.device("meta"):
        vae: Any = AutoencoderKLWan.from_config(config)
    return 4 * sum(weight.numel() for weight in vae.parameters()) + decoding_bytes(vae, height, width).total(1)


def _missing(origin: str) -> UsageError:
    return UsageError(f"{origin} has no VAE; set source.components to a pipeline that has one")
