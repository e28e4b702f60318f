"""`mla-convert vbench`: generates videos for VBench's standard prompts and scores them with the user's own VBench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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

PANELS = {
    "Scores": ("checkout", "python", "dimensions", "samples", "published"),
    "Output": ("out", "seconds", "latent_size", "fps"),
    "Prompts": ("prompt_embeds", "longer_prompts", "list_prompts", "negative_prompt", "components"),
    "Sampling": SAMPLING,
    "Memory and speed": EXECUTION,
}


@in_panels(PANELS)
def vbench(
    model: Model,
    checkout: Annotated[Path, typer.Option("--vbench", metavar="FOLDER", help="A checkout of VBench's repository.")],
    python: Annotated[
        str | None,
        typer.Option(help="Python of VBench's own environment; without it videos are generated but not scored."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for videos, scores and report; by default in the run folder."),
    ] = None,
    seconds: Annotated[int, typer.Option(min=1, help="Length of the videos; above 5 for VBench-Long.")] = 5,
    samples: Annotated[int, typer.Option(min=1, max=5, help="Videos per prompt; VBench asks for 5.")] = 5,
    dimensions: Annotated[
        list[str] | None, typer.Option("--dimension", metavar="NAME", help="Repeatable; all 16 by default.")
    ] = None,
    components: Components = None,
    prompt_embeds: Annotated[
        Path | None, typer.Option(help="Output of `encode --prompts` for --list-prompts, instead of a text encoder.")
    ] = None,
    longer_prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Rewritten prompts, in the order of prompts/all_dimension.txt.")
    ] = None,
    published: Annotated[
        Path | None, typer.Option(metavar="JSON", help="{name: {dimension: value}} to show beside the scores.")
    ] = None,
    list_prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Only write the prompts, one per line, for `encode --prompts`.")
    ] = None,
    steps: Steps = None,
    sampler: SamplerName = None,
    denoising_steps: DenoisingSteps = None,
    first_chunk_steps: FirstChunkSteps = None,
    shift: Shift = None,
    guidance_scale: GuidanceScale = None,
    negative_prompt: NegativePrompt = None,
    context_noise: ContextNoise = None,
    latent_size: LatentSize = None,
    fps: Annotated[int | None, typer.Option(min=1, help="Frames per second; 16 for latents, 8 for pixels.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Each video gets its own seed, derived from this one.")] = 0,
    dtype: DType = None,
    vae_dtype: VaeDType = None,
    offload: OffloadTo = "none",
    kernels: Kernels = None,
    expand_history: ExpandHistory = None,
    cuda_graph: CudaGraph = None,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Generate videos for VBench's standard prompts, score them with your own VBench, and report the scores.

    Run it again to continue where it stopped, video by video, then dimension by
    dimension.

    Steps, sampler, shift and guidance default to those of the recipe that made
    the model.
    """
    generate = sampling(
        denoising_steps,
        first_chunk_steps,
        num_inference_steps=steps,
        sampler=sampler,
        shift=shift,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        context_noise=context_noise,
        fps=fps,
        seed=seed,
    )
    if latent_size is not None:
        generate["latent_height"], generate["latent_width"] = parse_size(latent_size)
    with stderr().status("loading PyTorch"):
        from ..distill.progress import progress_bars
        from ..pipeline.vbench import VBenchConfig, run_vbench
        from ..pipeline.vbench import list_prompts as write_prompt_list

    config = VBenchConfig(
        checkout,
        python,
        seconds,
        samples,
        tuple(dimensions or ()),
        longer_prompts,
        prompt_embeds,
        components,
        published,
        generate,
        **execution(dtype, vae_dtype, offload, kernels, expand_history, cuda_graph, cache),
    )
    if list_prompts is not None:
        count = write_prompt_list(config, list_prompts)
        print_result(as_json, {"prompts": count, "path": str(list_prompts)}, f"{count} prompts: {list_prompts}")
        return
    with progress_bars(stderr()) as report:
        result = run_vbench(model, out, config, report)
    if python is None:
        print_result(as_json, result, f"{result['videos']} videos: {result['out']}; score them with --python")
        return
    scores = [f"{name:24} {entry['score']:.4f}" for name, entry in result["scores"].items()]
    scores += [f"{name + ' score':24} {value:.4f}" for name, value in result["totals"].items()]
    print_result(as_json, result, *scores, f"report: {result['report']}")
