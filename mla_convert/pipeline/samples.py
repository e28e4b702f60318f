"""The samples of a run: teacher and student draw the prompts of `generate` from the same noise, side by side."""

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

from ..distill.encode.models import load_vae, text_encoder
from ..errors import UsageError
from ..evaluate.samples import Comparison
from ..families.image import reads_image
from ..files import atomic_folder, save_tensors
from ..load import Source, read_json
from ..load.hub import is_hub_id
from ..run.decode import frame_chunks
from ..run.parts import PICTURES, TEXT, find_parts, parts_here
from ..run.sample import DIGITS, check_text_width, check_vae, embed_prompts, latent_scale, prompt_encoder, rollout
from ..run.video import Frames, save_video, side_by_side
from .context import CHECKPOINT, KERNELS, ROLLOUTS, SAMPLES, Context

# A file's name has 255 bytes, a character up to three of them.
_LONGEST = 80


def check_samples(source: Source, prompts: tuple[str, ...]) -> None:
    """Raise UsageError for prompts that a model cannot draw here: it wants an image, or nobody has its encoder."""
    if reads_image(source.config):
        raise UsageError("the model is conditioned on an image; leave generate.prompts out and use `generate --image`")
    encoder = prompt_encoder(source.config)
    if encoder == DIGITS:
        embed_prompts(prompts, encoder)
        return
    place = source.components or source.origin
    wanted = [*TEXT, *(PICTURES if latent_scale(source.config).spatial > 1 else ())]
    has = parts_here(place, wanted)
    if has is not None and (has / "text_encoder" / "config.json").is_file():
        check_text_width(read_json(has / "text_encoder" / "config.json").get("d_model", 0), source.config, has)
    if has is None and (Path(place).expanduser().exists() or not is_hub_id(place)):
        raise UsageError(
            f"{place} has no {' and '.join(wanted)}; name a pipeline that has them with source.components, or leave "
            "generate.prompts out"
        )


def make_samples(context: Context) -> None:
    """Write the rollouts of both models, latents or pixels, and a video of each prompt."""
    generate = context.recipe.generate
    embeds, negative = _texts(context)
    videos, chosen = {}, {}
    for name in ("teacher", "student"):
        model = context.dense() if name == "teacher" else context.load_stage(-1, context.dtype)
        streaming = context.recipe.streaming
        (streaming.dense if name == "teacher" else streaming).apply(model)

        def told(done: int, total: int, name: str = name) -> None:
            context.report(f"sample {name}", done, total)

        chunks = rollout(model.to(context.device), embeds, generate, told, negative_hidden_states=negative)
        videos[name] = torch.cat([chunk.cpu() for chunk in chunks], dim=2)
        chosen[name] = model.kernels.report()
        model.to("cpu")
    # The report shows the same frames.
    context.drawn = _drawn(context, videos)
    with atomic_folder(context.path / SAMPLES) as folder:
        save_tensors(videos, folder / ROLLOUTS, {KERNELS: json.dumps(chosen)})
        for index, made in enumerate(context.drawn):
            words = re.sub(r"\W+", "-", made.prompt).strip("-")[:_LONGEST]
            save_video(side_by_side(made.teacher, made.student), folder / f"{index:02d}-{words}.mp4", made.fps)


def comparisons(context: Context) -> Sequence[Comparison]:
    """What the samples of a run show."""
    if not context.recipe.generate.prompts:
        return []
    return context.drawn or _drawn(context, load_file(context.path / SAMPLES / ROLLOUTS))


def _texts(context: Context) -> tuple[Tensor, Tensor | None]:
    """Embeddings `[B, L, D]` of the prompts and `[1, L, D]` of what guidance leads away from."""
    generate = context.recipe.generate
    guided, negative = generate.guidance_scale != 1, generate.negative_prompt
    if prompt_encoder(context.source.config) == DIGITS:
        # Without one the rollout takes zeros, the digits' empty prompt.
        away = embed_prompts([negative], DIGITS) if guided and negative else None
        return embed_prompts(generate.prompts, DIGITS), away
    parts = find_parts(context.path / CHECKPOINT, TEXT, context.source.components)
    if parts is None:
        raise UsageError(f"{context.source.origin} has no text encoder; set source.components, a pipeline that has one")
    with text_encoder(parts, torch.bfloat16, context.device) as embed:
        prompts = torch.cat([embed([prompt]) for prompt in generate.prompts]).float()
        check_text_width(prompts.shape[2], context.source.config, parts)
        return prompts, embed([negative or ""]).float() if guided else None


def _drawn(context: Context, videos: dict[str, Tensor]) -> list[Comparison]:
    """Both models' frames for each prompt, decoded where they are latents."""
    generate, vae = context.recipe.generate, None
    if latent_scale(context.source.config).spatial > 1:
        parts = find_parts(context.path / CHECKPOINT, PICTURES, context.source.components)
        if parts is None:
            raise UsageError(f"{context.source.origin} has no VAE; set source.components, a pipeline that has one")
        vae = load_vae(parts, context.device)
        check_vae(vae, context.source.config, f"the VAE in {parts}", "set source.components")
    drawn = []
    for index, prompt in enumerate(generate.prompts):
        teacher, student = (_frames(videos[name][index], vae) for name in ("teacher", "student"))
        drawn.append(Comparison(prompt, teacher, student, generate.fps))
    return drawn


def _frames(video: Tensor, vae: Any) -> Frames:
    """Frames `[F, H, W, 3]` of one rollout `[C, F, h, w]`, a latent frame at a time."""
    return np.concatenate([frames for (frames,) in frame_chunks(video.unsqueeze(0).split(1, dim=2), vae)])
