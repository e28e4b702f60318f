"""Loads and runs the VAE, the text encoder and the image encoder of a Wan pipeline; each is freed after use.

They follow diffusers' WanPipeline. Its own method cleans and pads prompts. Latents are the
mode of the VAE's distribution, standardized by the mean and standard deviation in its configuration.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from ...devices import bring_weights
from ...errors import UsageError, UserError
from ...load.hub import download
from ..normalization import Scale, normalized

logger = logging.getLogger(__name__)

TEXT_TOKENS = 512
VAE, TEXT_ENCODER, TOKENIZER = "vae", "text_encoder", "tokenizer"
IMAGE_ENCODER, IMAGE_PROCESSOR = "image_encoder", "image_processor"
# Every Wan transformer works on patches of 2x2 latent pixels.
PATCH = 2


def find_pipeline(model: str, revision: str | None, config_only: bool, images: bool = False) -> tuple[Path, str | None]:
    """The folder of a pipeline and its commit on the Hub, None for a local folder. Raises UserError.

    With `config_only`, only configurations are downloaded; with `images`, also the image encoder.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder, None
    parts = [VAE, TEXT_ENCODER, *([IMAGE_ENCODER] if images else [])]
    patterns = ["model_index.json", *(f"{part}/config.json" for part in parts)]
    if not config_only:
        patterns += [f"{part}/*.{kind}" for part in parts for kind in ("json", "safetensors")]
        patterns += [f"{TOKENIZER}/*", *([f"{IMAGE_PROCESSOR}/*"] if images else [])]
    snapshot = download(model, revision, patterns)
    return snapshot, snapshot.name


def check_model(folder: Path, videos: bool) -> None:
    """Raise UserError unless a pipeline has Wan's type of text encoder and, for `videos`, of VAE."""
    found = _config(folder, TEXT_ENCODER).get("model_type")
    if found != "umt5":
        raise UserError(f"the text encoder of {folder} is of type {found}; give a Wan pipeline, which has umt5")
    if videos:
        found = _config(folder, VAE).get("_class_name")
        if found != "AutoencoderKLWan":
            raise UserError(f"the VAE of {folder} is {found}; give a Wan pipeline, which has AutoencoderKLWan")


def has_image_encoder(folder: Path) -> bool:
    """Whether a pipeline has a CLIP image encoder, as Wan2.1's image-to-video pipelines do."""
    return (folder / IMAGE_ENCODER / "config.json").is_file()


def check_size(folder: Path, frames: int, height: int, width: int) -> None:
    """Raise UsageError unless the VAE's and the transformer's factors divide the video's size."""
    config = _config(folder, VAE)
    temporal, spatial = config.get("scale_factor_temporal", 4), config.get("scale_factor_spatial", 8)
    if (frames - 1) % temporal:
        below = frames - (frames - 1) % temporal
        raise UsageError(
            f"--frames {frames}: the VAE takes one frame and then {temporal} at a time; "
            f"give {below} or {below + temporal}"
        )
    step = spatial * PATCH
    for name, value in (("height", height), ("width", width)):
        if value % step:
            near = max(step, round(value / step) * step)
            raise UsageError(
                f"--{name} {value} is not a multiple of {step} (VAE {spatial} x patch {PATCH}); give {near}"
            )


@torch.no_grad()
def encode_text(
    tokenizer: Any, encoder: Any, prompts: list[str], device: torch.device, tokens: int = TEXT_TOKENS
) -> Tensor:
    """Embed prompts as `WanPipeline` does: cleaned, zero-padded to `[B, tokens, D]`."""
    from diffusers import WanPipeline

    embeds: Tensor
    embeds, _ = WanPipeline(tokenizer, encoder, None, None).encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=tokens, device=device
    )
    return embeds


@contextlib.contextmanager
def text_encoder(folder: Path, dtype: torch.dtype, device: torch.device) -> Iterator[Callable[[list[str]], Tensor]]:
    """A function from B prompts to zero-padded embeddings `[B, 512, D]` in `dtype`. The model is freed at the end.

    It runs on the CPU, with a warning, if it does not fit on `device`.
    """
    from transformers import AutoTokenizer, UMT5EncoderModel

    with _explained(folder):
        # By default transformers asks on the terminal whether to run code of the folder.
        tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER, trust_remote_code=False)
        encoder = UMT5EncoderModel.from_pretrained(folder / TEXT_ENCODER, dtype=dtype).eval()
    try:
        encoder.to(device)
    except torch.OutOfMemoryError:
        logger.warning("the text encoder does not fit on %s; it runs on the CPU, which takes longer", device)
        device = torch.device("cpu")
        encoder.to(device)
        torch.cuda.empty_cache()
    try:
        yield lambda prompts: encode_text(tokenizer, encoder, prompts, device).to("cpu", dtype)
    finally:
        _free(encoder)


@torch.no_grad()
def encode_image(processor: Any, encoder: Any, image: Image.Image) -> Tensor:
    """Tokens `[1, 257, D]` of an image: a CLIP encoder's second-to-last hidden states, as Wan2.1 reads them."""
    bring_weights(encoder)
    inputs = processor(images=image, return_tensors="pt")
    pixels = inputs["pixel_values"].to(encoder.device, encoder.dtype)
    tokens: Tensor = encoder(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    return tokens


@contextlib.contextmanager
def image_encoder(folder: Path, device: torch.device) -> Iterator[Callable[[Image.Image], Tensor]]:
    """A function from an image to its tokens `[1, 257, D]`, float32 on the CPU. The model is freed at the end."""
    from transformers import CLIPImageProcessor, CLIPVisionModel

    with _explained(folder):
        processor = CLIPImageProcessor.from_pretrained(folder / IMAGE_PROCESSOR)
        encoder = CLIPVisionModel.from_pretrained(folder / IMAGE_ENCODER, dtype=torch.float32).to(device).eval()
    try:
        yield lambda image: encode_image(processor, encoder, image).cpu()
    finally:
        _free(encoder)


def load_vae(folder: Path, device: torch.device | str = "cpu") -> Any:
    """Load the VAE of a pipeline in float32, as diffusers recommends for Wan. Raises UserError."""
    from diffusers import AutoencoderKLWan

    with _explained(folder):
        vae: Any = AutoencoderKLWan.from_pretrained(folder / VAE, dtype=torch.float32)
    return vae.to(device).eval()


def encode_pixels(vae: Any, pixels: Tensor, raw: bool = False) -> Tensor:
    """Encode pixels `[B, 3, F, H, W]` in [-1, 1] to latents `[B, C, f, h, w]`, float32.

    Latents are normalized for the transformer, or with `raw` left as the VAE returns them.
    """
    bring_weights(vae)
    # Always use the same algorithm, so that a resumed run writes the same bytes.
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        mode: Tensor = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
    return mode if raw else normalized(vae, mode)


@contextlib.contextmanager
def video_vae(folder: Path, device: torch.device) -> Iterator[Any]:
    """The VAE of a pipeline, in float32. It is freed at the end."""
    vae = load_vae(folder, device)
    try:
        yield vae
    finally:
        _free(vae)


def latents_scale(folder: Path) -> Scale:
    """The statistics that normalize the latents of a pipeline's VAE. Raises UserError."""
    config = _config(folder, VAE)
    try:
        return Scale(tuple(config["latents_mean"]), tuple(config["latents_std"]))
    except KeyError as error:
        raise UserError(f"{folder / VAE}/config.json has no {error.args[0]}; give a pipeline with a Wan VAE") from None


def _config(folder: Path, part: str) -> dict[str, Any]:
    path = folder / part / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no {part}/config.json; give the folder or Hub ID of a pipeline") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return config


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load the models of {folder}: {reason}") from None


def _free(model: nn.Module) -> None:
    # Dropping references is not enough, because callers may still hold one.
    model.to("meta")
    torch.cuda.empty_cache()
