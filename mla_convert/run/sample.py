"""Rolls out prompts, for the `generate` command and for the samples of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
from ..mla.window import CausalConfig
from ..zoo.digits.data import FRAME, GUIDANCE, SHIFT, TEXT_DIM, parse_prompt
from .config import GenerateConfig
from .extent import video_end
from .source_video import SourceVideo, open_source
from .start import LATENTS, read_start
from .stream import Seeds, stream_chunks

DIGITS = "digits"
DIGITS_FPS = 8


class LatentScale(NamedTuple):
    """The scale of latents relative to a video.

    `temporal` is the number of video frames per latent frame after the first, `spatial` the number of pixels per latent
    pixel in height and width. `size` is the default height and width of the latent.
    """

    temporal: int
    spatial: int
    size: tuple[int, int]


PIXELS = LatentScale(1, 1, (60, 104))
WAN21 = LatentScale(4, 8, (60, 104))
# The VAE of Wan2.2-TI2V-5B; 704x1280 is that model's own size.
WAN22 = LatentScale(4, 16, (44, 80))
_BY_CHANNELS = {1: PIXELS, 3: PIXELS, 48: WAN22}


def prompt_encoder(config: Any) -> str | None:
    """`digits` for a model with the embedded teacher's shapes, which needs no text encoder; otherwise None."""
    return DIGITS if config.get("text_dim") == TEXT_DIM and config.get("in_channels") == 1 else None


def latent_scale(config: Any) -> LatentScale:
    """The scale of a transformer's latents, derived from its channels; pixels are latents of scale 1."""
    return _BY_CHANNELS.get(noise_channels(config), WAN21)


def check_text_width(wide: int, config: Any, place: Path) -> None:
    """Raise UserError unless the text encoder in `place`, with `wide` numbers per token, fits the transformer."""
    wanted = config.get("text_dim")
    if wide != wanted:
        raise UserError(f"the text encoder in {place} makes {wide} numbers per token, but the model reads {wanted}")


def check_vae(vae: Any, config: Any, name: str, remedy: str) -> None:
    """Raise UserError unless a VAE's latents fit a transformer; `name` and `remedy` are for the message."""
    channels, wanted, found = noise_channels(config), latent_scale(config), vae.config
    if found.z_dim != channels:
        raise UserError(f"{name} has latents of {found.z_dim} channels, but the model makes {channels}; {remedy}")
    temporal, spatial = found.scale_factor_temporal, found.scale_factor_spatial
    if (temporal, spatial) != (wanted.temporal, wanted.spatial):
        raise UserError(
            f"a latent of {name} covers {temporal} frames of {spatial}x{spatial} pixels, but one of a model of "
            f"{channels} channels covers {wanted.temporal} frames of {wanted.spatial}x{wanted.spatial}; {remedy}"
        )


def latent_size(config: Any, generate: GenerateConfig) -> tuple[int, int]:
    """Height and width of the latent: as requested, or by default 16x16 for digits and the model's size for others."""
    height, width = (FRAME, FRAME) if prompt_encoder(config) == DIGITS else latent_scale(config).size
    return generate.latent_height or height, generate.latent_width or width


def trained_for(recorded: Mapping[str, Any], digits: bool) -> dict[str, Any]:
    """How a model is sampled, in keys of GenerateConfig: the keys of a recipe's section that differ from defaults."""
    default = GenerateConfig().model_dump(mode="json")
    own: dict[str, Any] = {"shift": SHIFT, "guidance_scale": GUIDANCE, "fps": DIGITS_FPS} if digits else {}
    return {**own, **{key: recorded[key] for key in TRAINED_FOR if key in recorded and recorded[key] != default[key]}}


def to_latent(name: str, pixels: int, spatial: int) -> int:
    """A height or width (`name`) in latent pixels. Raises UsageError for one that the VAE cannot divide."""
    if pixels < 1 or pixels % spatial:
        near = max(spatial, round(pixels / spatial) * spatial)
        raise UsageError(f"a {name} of {pixels} is not a multiple of the VAE's {spatial}; use {near}")
    return pixels // spatial


def check_latent_size(config: Any, height: int, width: int, spatial: int = 1) -> None:
    """Raise UsageError unless a model's patches divide a latent; `spatial` is the VAE's factor to pixels."""
    _, p_h, p_w = config.get("compressed_patch_size") or config["patch_size"]
    for name, value, patch in (("height", height, p_h), ("width", width, p_w)):
        if value % patch:
            near = max(patch, round(value / patch) * patch)
            pixels = f" ({near * spatial} pixels)" if spatial > 1 else ""
            raise UsageError(
                f"a latent of {height}x{width} does not divide into patches of {p_h}x{p_w}; "
                f"use a {name} of {near}{pixels}"
            )


def check_length(config: Any, num_frames: int | None) -> None:
    """Raise UsageError if the rotary table of a model's configuration ends before `num_frames` (see `video_end`)."""
    causal = CausalConfig(**(config.get("causal") or {}))
    video_end(causal, config.get("rope_max_seq_len") or 1024, num_frames)


def embed_prompts(prompts: Sequence[str], encoder: str | None) -> Tensor:
    """`encoder_hidden_states` `[B, L, D]` of text prompts. Raises UsageError unless `encoder` is `digits`."""
    if encoder != DIGITS:
        raise UsageError("no text encoder was found for this model; give --prompt-embeds, a .safetensors file")
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


def shortest(frames: int | None, source: object) -> int | None:
    """The length of a rollout of at most `frames` frames with `source`, if latents `[B, C, F, H, W]` fix its length."""
    lengths = [frames, source.shape[2] if isinstance(source, Tensor) else None]
    return min((length for length in lengths if length is not None), default=None)
