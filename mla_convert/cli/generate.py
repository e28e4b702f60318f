"""`mla-convert generate`: generates videos of any length with a dense or converted model."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..interrupts import INTERRUPTED
from .options import (
    Cache,
    Components,
    ContextNoise,
    CudaGraph,
    DenoisingSteps,
    DType,
    ExpandHistory,
    FirstChunkSteps,
    GuidanceScale,
    Json,
    Kernels,
    LatentSize,
    Model,
    NegativePrompt,
    OffloadTo,
    SamplerName,
    Shift,
    Steps,
    VaeDType,
    execution,
    parse_size,
    sampling,
)
from .output import print_result, stderr
from .panels import EXECUTION, SAMPLING, in_panels
from .together import together

PANELS = {
    "Output": ("out", "fps"),
    "Prompt": (
        "prompt",
        "prompt_embeds",
        "prompt_at",
        "prompts",
        "recache",
        "negative_prompt",
        "negative_embeds",
        "components",
    ),
    "Length and size": ("frames", "seconds", "endless", "size", "latent_size"),
    "Sampling": SAMPLING,
    "Input": ("start", "hold_start", "source", "strength", "image"),
    "Memory and speed": EXECUTION,
}


@together
@in_panels(PANELS)
def generate(
    model: Model,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="An .mp4 or .gif, .safetensors for latents, a folder, or - for an mp4 on stdout; an existing file "
            "or folder of frames is replaced.",
        ),
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt, such as '7 at 2,1 moving up-left'; repeatable, one video each.")
    ] = None,
    prompt_embeds: Annotated[
        Path | None, typer.Option(help="A .safetensors file with prompt_embeds [L, D], for models with a text encoder.")
    ] = None,
    prompt_at: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SECONDS:TEXT", help="Change the prompt at this time, such as '5:a cat sits'; repeatable."
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A YAML or .jsonl file: a list of entries with seconds and prompt.")
    ] = None,
    recache: Annotated[
        bool | None,
        typer.Option(
            "--recache/--no-recache",
            help="Recompute the cached window where the prompt changes, as LongLive does.",
            show_default=False,
        ),
    ] = None,
    negative_prompt: NegativePrompt = None,
    negative_embeds: Annotated[
        Path | None,
        typer.Option(help="Embedding of the negative prompt; by default negative.safetensors beside --prompt-embeds."),
    ] = None,
    components: Components = None,
    frames: Annotated[
        int | None,
        typer.Option(min=1, help="Length in latent frames, any number; by default 21, or all of --source."),
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Length in seconds, instead of --frames.")] = None,
    endless: Annotated[bool, typer.Option("--endless", help="Continue until Ctrl-C.")] = False,
    steps: Steps = None,
    sampler: SamplerName = None,
    denoising_steps: DenoisingSteps = None,
    first_chunk_steps: FirstChunkSteps = None,
    shift: Shift = None,
    guidance_scale: GuidanceScale = None,
    start: Annotated[
        Path | None,
        typer.Option(help="Start from an image, a video, or a .safetensors file with latents [C, F, H, W]."),
    ] = None,
    hold_start: Annotated[
        bool | None,
        typer.Option(
            "--hold-start/--no-hold-start",
            help="Let --start end inside a chunk and denoise that chunk's other frames beside it, as TI2V-5B does.",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(help="Restyle a video, or a .safetensors file with latents [C, F, H, W], chunk by chunk."),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(metavar="S", help="How much of --source is replaced: above 0, at most 1. 0.5 by default."),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="Conditioning image of an image-to-video model; use --start for other models."),
    ] = None,
    context_noise: ContextNoise = None,
    size: Annotated[str | None, typer.Option(metavar="HxW", help="Height and width in pixels.")] = None,
    latent_size: LatentSize = None,
    fps: Annotated[int | None, typer.Option(min=1, help="Frames per second; 8 for digits, 16 for others.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise; each further prompt uses the next one.")] = 0,
    dtype: DType = None,
    vae_dtype: VaeDType = None,
    offload: OffloadTo = "none",
    kernels: Kernels = None,
    expand_history: ExpandHistory = None,
    cuda_graph: CudaGraph = None,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Generate a video of any length in constant memory; Ctrl-C ends it and finishes the file.

    Steps, sampler, shift, guidance and frame rate default to those of the recipe that made the model. Under
    `torchrun --nproc-per-node N -m mla_convert`, N GPUs make one video together.
    """
    if prompt_embeds is not None and prompt:
        raise UsageError("give --prompt or --prompt-embeds, not both")
    if not (prompt or prompt_embeds or prompts):
        raise UsageError("no prompt; give --prompt, --prompt-embeds, or --prompts with an entry at 0 seconds")
    if negative_prompt is not None and negative_embeds is not None:
        raise UsageError("give --negative-prompt or --negative-embeds, not both")
    if [frames is None, seconds is None, not endless].count(False) > 1:
        raise UsageError("give only one of --frames, --seconds and --endless")
    if source is not None and endless:
        raise UsageError("the video ends where --source ends; leave --endless out")
    if seconds is not None and math.isinf(seconds) and seconds > 0:
        raise UsageError("--seconds needs a number; give --endless for a video without an end")
    if hold_start and start is None:
        raise UsageError("--hold-start holds the frames of --start; give --start, or leave --hold-start out")
    if size is not None and latent_size is not None:
        raise UsageError("give --size or --latent-size, not both")
    if str(out) == "-":
        if as_json:
            raise UsageError("--json prints to stdout, where `--out -` writes the video; choose a file")
        if sys.stdout.isatty():
            raise UsageError("stdout is a terminal; pipe the video into a player or a file")
    settings = sampling(
        denoising_steps,
        first_chunk_steps,
        num_frames=frames,
        num_inference_steps=steps,
        sampler=sampler,
        shift=shift,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        context_noise=context_noise,
        recache=recache,
        hold_start=hold_start,
        fps=fps,
        seed=seed,
        start=None if start is None else str(start),
        source=None if source is None else str(source),
        strength=strength,
    )
    if latent_size is not None:
        settings["latent_height"], settings["latent_width"] = parse_size(latent_size)
    executed = execution(dtype, vae_dtype, offload, kernels, expand_history, cuda_graph, cache)
    with stderr().status("loading PyTorch"):
        from ..distill.progress import progress_bars
        from ..pipeline.generation import Request, generate_video
        from ..pipeline.prompts import in_order, parse_change, read_prompts

    changes = [parse_change(text) for text in prompt_at or []] + (read_prompts(prompts) if prompts else [])
    changes, first = in_order(changes), tuple(prompt or ())
    if not first and prompt_embeds is None:
        if changes[0].seconds > 0:
            raise UsageError(f"{prompts} has no prompt at 0 seconds; give --prompt for the beginning")
        first, changes = (changes[0].prompt,), changes[1:]
    if recache and not changes and prompts is None:
        raise UsageError("--recache acts where the prompt changes; give --prompt-at or --prompts, or leave it out")
    request = Request(
        prompts=first,
        prompt_embeds=prompt_embeds,
        changes=tuple(changes),
        negative_embeds=negative_embeds,
        image=image,
        components=components,
        seconds=seconds,
        endless=endless,
        size=None if size is None else parse_size(size),
        **executed,
    )
    with progress_bars(stderr()) as report:
        result = generate_video(model, out, request, settings, report)
    unit = "frame" if result["pixels"] else "latent frame"
    speed = f"{result['frames']:,} {unit}{'' if result['frames'] == 1 else 's'}, "
    speed += f"{result['frames_per_second']:.1f} per second"
    if str(out) == "-":
        stderr().print(f"wrote stdout: {speed}", soft_wrap=True, markup=False, highlight=False)
    else:
        print_result(as_json, result, f"wrote {', '.join(result['paths'])}: {speed}")
    if result["interrupted"]:
        raise typer.Exit(INTERRUPTED)
