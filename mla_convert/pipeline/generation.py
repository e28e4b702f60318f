"""Stream a video from a checkpoint into a file, chunk by chunk, in constant memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..distill.progress import Report
from ..errors import UsageError
from ..files import atomic_file
from ..recipe.schema import validate
from ..run.config import GenerateConfig
from ..run.sample import DIGITS, embed_prompts, latent_size, load_prompt_embeds, prompt_encoder, rollout
from ..run.video import check_suffix, save_video, to_frames
from ..zoo.digits.data import GUIDANCE, SHIFT
from .experts import load_models

LATENTS = ".safetensors"


def generate_video(
    folder: Path,
    out: Path,
    prompt: str | None,
    prompt_embeds: Path | None,
    settings: Mapping[str, Any],
    dtype: str | None,
    report: Report,
) -> dict[str, Any]:
    """Roll the model in `folder`, or its experts, out for one prompt, or for its embeddings, and write `out`.

    `settings` are keys of GenerateConfig; what is left out is what the model was trained for where
    that is known. A `.safetensors` file gets the latents `[C, F, H, W]`
    under `latents`; everything else is a picture, which needs a model of pixels. Raises UserError.
    """
    validate(GenerateConfig, dict(settings))
    if out.suffix != LATENTS:
        check_suffix(out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = load_models(folder, None if dtype is None else getattr(torch, dtype), device)
    model = models[0]
    if out.suffix != LATENTS and model.config.out_channels not in (1, 3):
        raise UsageError(f"the model makes latents and has no VAE here; write them to {out.with_suffix(LATENTS)}")
    if prompt_encoder(model.config) == DIGITS:
        settings = {"shift": SHIFT, "guidance_scale": GUIDANCE, **settings}
    config = validate(GenerateConfig, dict(settings))
    if prompt is not None:
        embeds = embed_prompts([prompt], prompt_encoder(model.config))
    else:
        assert prompt_embeds is not None
        embeds = load_prompt_embeds(prompt_embeds, model.config.text_dim)[:1]
    try:
        model.token_grid(*latent_size(model.config, config))
    except ValueError as error:
        raise UsageError(str(error)) from None
    started = time.monotonic()
    chunks = _first_of_batch(rollout(models, embeds, config, lambda done, total: report("generate", done, total)))
    if out.suffix == LATENTS:
        latents = torch.cat(list(chunks), dim=1).contiguous()
        with atomic_file(out) as temporary:
            save_file({"latents": latents}, temporary)
    else:
        save_video((to_frames(chunk) for chunk in chunks), out, config.fps)
    seconds = time.monotonic() - started
    return {
        "path": str(out),
        "frames": config.num_frames,
        "seconds": round(seconds, 3),
        "frames_per_second": config.num_frames / seconds,
    }


def _first_of_batch(chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    return (chunk[0].cpu() for chunk in chunks)
