"""Generates a run's samples: teacher and student roll out the prompts of `generate` from the same noise."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..distill.encode.models import text_encoder
from ..errors import UsageError
from ..evaluate.samples import Comparison
from ..families.image import reads_image
from ..files import atomic_folder, save_tensors
from ..load import Source, read_json
from ..load.hub import is_hub_id
from ..run.decode import decode_chunks
from ..run.latents import DIGITS, check_text_width, latent_scale, prompt_encoder
from ..run.offload import Offload, place, traveling
from ..run.parts import PICTURES, TEXT, find_parts, parts_here
from ..run.sample import embed_prompts, rollout
from ..run.video import Frames, save_video, side_by_side, to_frames
from .context import CHECKPOINT, KERNELS, ROLLOUTS, SAMPLES, Context
from .vae import source_vae

# A file name has at most 255 bytes; this leaves room for its number, its ending and the temporary name.
_MAX_NAME_BYTES = 150


def check_samples(source: Source, prompts: tuple[str, ...]) -> None:
    """Raise UsageError if the model needs an image, or if text encoder or VAE are missing or do not fit."""
    if reads_image(source.config):
        raise UsageError("the model is conditioned on an image; leave generate.prompts out and use `generate --image`")
    if prompt_encoder(source.config) == DIGITS:
        embed_prompts(prompts)
        return
    origin = source.components or source.origin
    needed = [*TEXT, *(PICTURES if latent_scale(source.config).spatial > 1 else ())]
    parts = parts_here(origin, needed)
    if parts is not None and (parts / "text_encoder" / "config.json").is_file():
        check_text_width(read_json(parts / "text_encoder" / "config.json").get("d_model", 0), source.config, parts)
    if parts is None and (Path(origin).expanduser().exists() or not is_hub_id(origin)):
        raise UsageError(
            f"{origin} has no {' and '.join(needed)}; set source.components to a pipeline that has them, or leave "
            "generate.prompts out"
        )


def make_samples(context: Context) -> None:
    """Write the rollouts of both models as latents or pixels, and a side-by-side video of each prompt."""
    generate = context.generate
    embeds, negative = _texts(context)
    videos, chosen = {}, {}
    for name in ("teacher", "student"):
        model = context.dense() if name == "teacher" else context.load_stage(-1, context.dtype)
        streaming = context.recipe.streaming
        (kernels,) = (streaming.dense if name == "teacher" else streaming).apply(model)

        def progress(done: int, total: int, name: str = name) -> None:
            context.report(f"sample {name}", done, total)

        offload: Offload = "group" if traveling([model], context.device) else "none"
        place([model], None, context.device, offload)
        chunks = rollout(model, embeds, generate, progress, negative_hidden_states=negative, device=context.device)
        videos[name] = torch.cat([chunk.cpu() for chunk in chunks], dim=2)
        chosen[name] = kernels.report()
        if offload == "none":
            model.to("cpu")
    # The report step shows the same frames without decoding them again.
    context.drawn = _decode(context, videos)
    with atomic_folder(context.path / SAMPLES) as folder:
        save_tensors(videos, folder / ROLLOUTS, {KERNELS: json.dumps(chosen)})
        for index, pair in enumerate(context.drawn):
            name = f"{index:02d}-{_words(pair.prompt)}.mp4"
            save_video(side_by_side(pair.teacher, pair.student), folder / name, pair.fps)


def _words(prompt: str) -> str:
    """The words of a prompt with dashes between them, cut to the length of a file name."""
    words = re.sub(r"\W+", "-", prompt).strip("-")
    return words.encode()[:_MAX_NAME_BYTES].decode(errors="ignore")


def comparisons(context: Context) -> Sequence[Comparison]:
    """The sample videos of a run, decoded; empty without prompts."""
    if not context.recipe.generate.prompts:
        return []
    return context.drawn or _decode(context, load_file(context.path / SAMPLES / ROLLOUTS))


def _texts(context: Context) -> tuple[Tensor, Tensor | None]:
    """Embeddings `[B, L, D]` of the prompts and `[1, L, D]` of the negative prompt, None if guidance needs none."""
    generate = context.recipe.generate
    guided, negative = generate.guidance_scale != 1, generate.negative_prompt
    if prompt_encoder(context.source.config) == DIGITS:
        # With None the rollout uses zeros, the empty prompt of digits models.
        negative_embeds = embed_prompts([negative]) if guided and negative else None
        return embed_prompts(generate.prompts), negative_embeds
    parts = find_parts(context.path / CHECKPOINT, TEXT, context.source.components)
    if parts is None:
        raise UsageError(
            f"{context.source.origin} has no text encoder; set source.components to a pipeline that has one"
        )
    with text_encoder(parts, torch.bfloat16, context.device) as embed:
        prompts = torch.cat([embed([prompt]) for prompt in generate.prompts]).float()
        check_text_width(prompts.shape[2], context.source.config, parts)
        return prompts, embed([negative or ""]).float() if guided else None


def _decode(context: Context, videos: dict[str, Tensor]) -> list[Comparison]:
    """Both models' frames for each prompt; latents are decoded by the VAE."""
    generate, vae = context.recipe.generate, None
    if latent_scale(context.source.config).spatial > 1:
        vae = source_vae(context.source, context.path / CHECKPOINT, context.device)
    pairs = []
    for index, prompt in enumerate(generate.prompts):
        teacher, student = (_frames(videos[name][index], vae) for name in ("teacher", "student"))
        pairs.append(Comparison(prompt, teacher, student, generate.fps))
    return pairs


def _frames(video: Tensor, vae: Any) -> Frames:
    """Frames `[F, H, W, 3]` of one rollout `[C, F, h, w]`, decoded one latent frame at a time."""
    return np.concatenate([to_frames(pixels[0]) for pixels in decode_chunks(video.unsqueeze(0).split(1, dim=2), vae)])
