"""Finds and loads the VAE of a run's source, and counts its bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from ..distill.encode.models import load_vae
from ..errors import UsageError
from ..load import Source, read_json
from ..load.hub import is_hub_id
from ..run.decode_memory import decoding_bytes
from ..run.latents import check_vae, latent_scale
from ..run.parts import PICTURES, find_parts, parts_here

_REMEDY = "set source.components"


def source_vae(source: Source, checkpoint: Path, device: torch.device | str = "cpu") -> Any:
    """Load the VAE that belongs to a `checkpoint` of `source`, in float32. Raises UserError for none or a wrong one."""
    parts = find_parts(checkpoint, PICTURES, source.components)
    if parts is None:
        raise _missing(source.origin)
    vae = load_vae(parts, device)
    check_vae(vae, source.config, f"the VAE in {parts}", _REMEDY)
    return vae


def check_source_vae(config: Any, origin: str, components: str | None) -> dict[str, Any] | None:
    """Check the VAE of the source `origin`, or of `components`, for a model of `config`; returns its configuration.

    None for one on the Hub, which is not looked for yet. Raises UserError if the model makes pixels or has no VAE that
    fits.
    """
    if latent_scale(config).spatial == 1:
        raise UsageError("reencode_first: this model makes pixels, which no VAE has to encode; leave it out")
    place = components or origin
    if is_hub_id(place) and not Path(place).expanduser().exists():
        return None
    # As `source_vae` looks for it: components are a pipeline, a model may be its transformer.
    parts = parts_here(origin, PICTURES) if components is None else find_parts(Path(), PICTURES, components)
    if parts is None:
        raise _missing(origin)
    found = read_json(parts / PICTURES[0] / "config.json")
    check_vae(_shape(found), config, f"the VAE in {parts}", _REMEDY)
    return found


def reencoding_bytes(config: dict[str, Any], height: int, width: int) -> int:
    """Bytes of decoding latents of `height x width` and encoding a frame with the VAE of `config`, in float32.

    Encoding one frame takes less than decoding a latent frame of several, and comes after it.
    """
    vae = _shape(config)
    return 4 * sum(weight.numel() for weight in vae.parameters()) + decoding_bytes(vae, height, width).total(1)


def _shape(config: dict[str, Any]) -> Any:
    """A VAE without weights."""
    with torch.device("meta"):
        return AutoencoderKLWan.from_config(config)


def _missing(origin: str) -> UsageError:
    return UsageError(f"{origin} has no VAE; set source.components to a pipeline that has one")
