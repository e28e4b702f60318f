"""Rolls out prompts, for the `generate` command and for the samples of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..distill.negative import EMBEDS_KEY, NEGATIVE
from ..errors import UsageError, UserError, few
from ..export.components import TRAINED_FOR
from ..families.base import noise_channels
from ..mla.conditions import FramesAt
from ..mla.model import StreamingModel
from ..zoo.digits.data import GUIDANCE, SHIFT, parse_prompt
from .config import GenerateConfig
from .latents import latent_scale, latent_size
from .source import shortest
from .source_video import SourceVideo, open_source
from .start import LATENTS, read_start
from .stream import Seeds, stream_chunks

DIGITS_FPS = 8


def trained_for(recorded: Mapping[str, Any], digits: bool) -> dict[str, Any]:
    """How a model is sampled, in keys of GenerateConfig: the keys of a recipe's section that differ from defaults."""
    default = GenerateConfig().model_dump(mode="json")
    own: dict[str, Any] = {"shift": SHIFT, "guidance_scale": GUIDANCE, "fps": DIGITS_FPS} if digits else {}
    return {**own, **{key: recorded[key] for key in TRAINED_FOR if key in recorded and recorded[key] != default[key]}}


def over_trained(given: Mapping[str, Any], recorded: Mapping[str, Any], digits: bool) -> dict[str, Any]:
    """The keys of GenerateConfig in `given`, and for others how the model is sampled (see `trained_for`).

    A number of steps also replaces the `denoising_steps` that the model was trained for. Raises UsageError for both.
    """
    if "num_inference_steps" in given:
        if given.get("denoising_steps") is not None:
            raise UsageError("give num_inference_steps or denoising_steps, not both")
        given = {"denoising_steps": None, "first_chunk_steps": None, **given}
    return {**trained_for(recorded, digits), **given}


def embed_prompts(prompts: Sequence[str]) -> Tensor:
    """`encoder_hidden_states` `[B, L, D]` of prompts for a digits model. Raises UsageError for other texts."""
    try:
        return torch.stack([parse_prompt(prompt).embedding() for prompt in prompts])
    except ValueError as error:
        raise UsageError(str(error)) from None


def prompt_files(path: Path) -> list[Path]:
    """The files that `encode --prompts` wrote in the folder `path`, or `path` itself. Raises UserError for none."""
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.glob("*.safetensors") if file.name != NEGATIVE)
    if not files:
        raise UserError(f"no .safetensors files in {path}; write them with `mla-convert encode --prompts`")
    return files


def load_prompt_embeds(path: Path, text_dim: int) -> Tensor:
    """`encoder_hidden_states` `[B, L, D]` from the tensor `prompt_embeds` of a file. Raises UserError."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read prompt embeddings from {path}: {error}") from None
    if EMBEDS_KEY not in tensors:
        raise UserError(f"{path} has no tensor {EMBEDS_KEY}; it has {few(sorted(tensors))}")
    embeds = tensors[EMBEDS_KEY]
    embeds = embeds.unsqueeze(0) if embeds.ndim == 2 else embeds
    if embeds.ndim != 3 or embeds.shape[2] != text_dim:
        raise UserError(f"{EMBEDS_KEY} in {path} has shape {list(embeds.shape)}; [L, {text_dim}] is expected")
    return embeds


def rollout(
    model: StreamingModel | Sequence[StreamingModel],
    embeds: Tensor,
    config: GenerateConfig,
    progress: Callable[[int, int], None] | None = None,
    *,
    start: Tensor | None = None,
    source: Tensor | FramesAt | None = None,
    endless: bool = False,
    seed: Seeds | None = None,
    **more: Any,
) -> Iterator[Tensor]:
    """Yield latent chunks `[B, C, F, H, W]`, float32, for `embeds` `[B, L, D]`; `progress` gets done and total frames.

    `model` may be several experts, as in `stream_chunks`; `more` are other arguments of it. `start`, `source` and
    `seed` override those of `config`. Raises UserError for a start or a source that does not fit.
    """
    shape = (model[0] if isinstance(model, Sequence) else model).config
    height, width = latent_size(shape, config)
    if start is None and config.start is not None:
        start = read_start(Path(config.start), noise_channels(shape), height, width).unsqueeze(0)
    if source is None and config.source is not None:
        source = read_source(config, shape)
    frames = None if endless else config.num_frames
    total = shortest(frames, source)
    done = 0
    chunks = stream_chunks(
        model,
        embeds,
        frames,
        height,
        width,
        seed=config.seed if seed is None else seed,
        start=start,
        source=source,
        strength=config.strength,
        recache=config.recache,
        hold_start=config.hold_start,
        **config.sampling(),
        **more,
    )
    try:
        for chunk in chunks:
            done += chunk.shape[2]
            if progress is not None:
                progress(done, total or done)
            yield chunk
    finally:
        if isinstance(source, SourceVideo):
            source.close()


def read_source(config: GenerateConfig, shape: Any) -> Tensor | SourceVideo:
    """The source of a rollout of a transformer with configuration `shape`; pictures only for a pixel-space model.

    Raises UserError for a source that cannot be read, and UsageError for pictures with a model of latents.
    """
    assert config.source is not None
    channels, (temporal, spatial, _) = noise_channels(shape), latent_scale(shape)
    path, size = Path(config.source), latent_size(shape, config)
    if spatial > 1 and path.is_file() and path.suffix != LATENTS:
        raise UsageError(
            f"{path}: the model works on latents; give a {LATENTS} file with latents, or use `generate --source`"
        )
    return open_source(path, (channels, *size), (temporal, spatial), config.fps)
