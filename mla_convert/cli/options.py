"""Declares the options that commands share, and parses their values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..dtypes import NAMES, checked
from ..errors import UsageError, quoted
from ..sizes import PRESET_NAMES
from .output import JSON

if TYPE_CHECKING:
    from ..mla.bits import CacheBits

VAE_DTYPES = ("float32", "bfloat16")


def dtype_parser(option: str, allowed: Sequence[str] = NAMES) -> Callable[[str], str]:
    """A parser of names of data types that takes the short ones too, and raises UsageError."""
    return functools.partial(checked, option, allowed=allowed)


Json = Annotated[bool, typer.Option(JSON, help="Print one JSON object on stdout.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a key of the recipe; repeatable.")
]
RunFolder = Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; by default runs/NAME of the recipe.")]
Kernels = Annotated[
    Literal["auto", "triton", "torch"] | None,
    typer.Option(help="What computes streaming attention; by default the recipe's streaming.kernels, else auto."),
]
ExpandHistory = Annotated[
    Literal["auto", "chunk", "pass"] | None,
    typer.Option(help="How often kernels expand the history; auto is once per chunk if memory allows."),
]
CudaGraph = Annotated[
    Literal["auto", "off"] | None, typer.Option(help="Replay a chunk's passes as a CUDA graph; auto by default.")
]
Cache = Annotated[
    str | None,
    typer.Option(
        metavar="BITS",
        help="Bits per cached latent number: auto, int8, or pairs such as 24x8,64x4; the last pair covers the rest.",
    ),
]
Components = Annotated[
    str | None,
    typer.Option(metavar="SOURCE", help="Folder or Hub ID of a pipeline with the VAE and text encoder to use."),
]
Expert = Annotated[
    str | None, typer.Option("--expert", metavar="NAME", help="Run only this expert of the recipe, in its own folder.")
]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.")]
RunRecipe = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file, or the name of a shipped recipe; with --resume and --out, by default the run's own.",
    ),
]
Model = Annotated[Path, typer.Argument(metavar="DIR", help="A run folder, a checkpoint or a transformer folder.")]
DType = Annotated[
    str | None,
    typer.Option(
        parser=dtype_parser("--dtype"), metavar="DTYPE", help="float32, bfloat16 or float16; by default that of DIR."
    ),
]
VaeDType = Annotated[
    str | None,
    typer.Option(
        parser=dtype_parser("--vae-dtype", VAE_DTYPES),
        metavar="DTYPE",
        help="Data type in which the VAE decodes, float32 by default; bfloat16 halves its memory.",
    ),
]
OffloadTo = Annotated[
    Literal["none", "model", "group"],
    typer.Option(help="For small GPUs: keep only one model, or one transformer block, on the GPU at a time."),
]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps per chunk.")]
SamplerName = Annotated[
    Literal["euler", "renoise"] | None,
    typer.Option(help="Euler steps, or new noise between steps for few-step students."),
]
DenoisingSteps = Annotated[
    str | None,
    typer.Option(metavar="T,T,...", help="Noise levels out of 1000 instead of --steps, such as 1000,750,500,250."),
]
FirstChunkSteps = Annotated[
    str | None, typer.Option(metavar="T,T,...", help="Denoising steps of the first chunk, if they differ.")
]
Shift = Annotated[float | None, typer.Option(min=0, help="Timestep shift; Wan was trained with 5.")]
GuidanceScale = Annotated[float | None, typer.Option(min=0, help="Classifier-free guidance, 1 for none.")]
NegativePrompt = Annotated[
    str | None,
    typer.Option(help="Negative prompt for guidance; by default the recipe's, else the empty prompt."),
]
ContextNoise = Annotated[float | None, typer.Option(min=0, max=1, help="Noise level of cached chunks.")]
LatentSize = Annotated[str | None, typer.Option(metavar="HxW", help="Height and width of the latent.")]
Preset = Annotated[str | None, typer.Option(help=f"A known model: {', '.join(PRESET_NAMES)}.")]


def parse_size(text: str) -> tuple[int, int]:
    """Parse a size such as `60x104` into height and width. Raises UsageError."""
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise UsageError(f"{quoted(text)} is not a size; write HEIGHTxWIDTH, such as 60x104")
    return int(height), int(width)


def parse_steps(text: str) -> list[int]:
    """Parse noise levels such as `1000,750,500,250`. Raises UsageError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(
            f"{quoted(text)} is not a list of denoising steps; write decreasing whole numbers such as 1000,750,500,250"
        )
    return [int(part) for part in parts]


def parse_cache(text: str) -> CacheBits:
    """Parse `--cache` into a value of `streaming.cache`. Raises UsageError."""
    from ..mla.bits import parse_bits

    try:
        return parse_bits(text)
    except ValueError as error:
        raise UsageError(f"--cache: {error}") from None


def execution(
    dtype: str | None,
    vae_dtype: str | None,
    offload: str,
    kernels: str | None,
    expand_history: str | None,
    cuda_graph: str | None,
    cache: str | None,
) -> dict[str, Any]:
    """Turn options of memory and speed into fields of an Execution. Raises UsageError."""
    streaming = {"kernels": kernels, "expand_history": expand_history, "cuda_graph": cuda_graph}
    given: dict[str, Any] = {key: value for key, value in streaming.items() if value is not None}
    if cache is not None:
        given["cache"] = parse_cache(cache)
    return {"dtype": dtype, "vae_dtype": vae_dtype, "offload": offload, "streaming": given}


def sampling(denoising_steps: str | None, first_chunk_steps: str | None = None, **options: Any) -> dict[str, Any]:
    """Turn sampling options into keys of a GenerateConfig; options that are None are left out. Raises UsageError."""
    levels = {"denoising_steps": denoising_steps, "first_chunk_steps": first_chunk_steps}
    options |= {key: None if text is None else parse_steps(text) for key, text in levels.items()}
    return {key: value for key, value in options.items() if value is not None}
