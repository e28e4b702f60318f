"""`mla-convert encode`: turns captioned videos, or prompts alone, into latents and text embeddings for training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import UsageError
from .options import Json, dtype_parser
from .output import print_result, stderr

_LISTED = 10
_IMAGES = ("image_latents", "encoder_hidden_states_image")


def encode(
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder for the shards.")],
    components: Annotated[
        str,
        typer.Option(metavar="SOURCE", help="Folder or Hub ID of a pipeline with the VAE and text encoder to use."),
    ],
    videos: Annotated[
        Path | None,
        typer.Argument(metavar="[VIDEOS]", help="Folder of NAME.mp4 with NAME.txt, or a table: .csv, .jsonl, .json."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Encode only prompts, one per line of this file, instead of VIDEOS."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of SOURCE on the Hub.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames per clip, taken from the start of the video.")] = 81,
    height: Annotated[int, typer.Option(min=1, help="Height in pixels; frames are center-cropped.")] = 480,
    width: Annotated[int, typer.Option(min=1, help="Width in pixels.")] = 832,
    fps: Annotated[
        float, typer.Option(min=0.1, help="Frames per second; videos with another rate are resampled.")
    ] = 16,
    dtype: Annotated[
        Literal["bfloat16", "float32"],
        typer.Option(
            parser=dtype_parser("--dtype", ("bfloat16", "float32")),
            metavar="DTYPE",
            help="Data type of the text encoder and of everything stored: bfloat16 or float32.",
        ),
    ] = "bfloat16",
    latents: Annotated[
        Literal["normalized", "raw"],
        typer.Option(help="normalized, as the transformer takes them, or raw VAE output, for FastVideo."),
    ] = "normalized",
    image_condition: Annotated[
        bool,
        typer.Option("--image-condition", help="Also store the image conditioning from each clip's first frame."),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips, or prompts, encoded at once.")] = 1,
    shard_size: Annotated[int, typer.Option(min=1, help="Clips, or prompts, per file.")] = 64,
    negative_prompt: Annotated[
        str | None,
        typer.Option(help="Negative prompt to encode for guidance; by default Wan's own.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue with the shards in the folder.")] = False,
    as_json: Json = False,
) -> None:
    """Encode videos and captions, or prompts alone, for training.

    Also runs under `accelerate launch` and `torch.distributed.run`: with n processes, each takes every n-th shard.
    """
    if (videos is None) == (prompts is None):
        raise UsageError("give exactly one of VIDEOS and --prompts")
    if image_condition and videos is None:
        raise UsageError("--image-condition encodes the first frames of VIDEOS; leave it out with --prompts")
    with stderr().status("loading PyTorch"):
        from ..distill.encode import EncodeConfig, encode_prompts, encode_videos
        from ..distill.negative import WAN_NEGATIVE_PROMPT
        from ..distill.progress import progress_bars
        from ..pipeline.run import this_process

    negative = WAN_NEGATIVE_PROMPT if negative_prompt is None else negative_prompt
    config = EncodeConfig(
        components,
        revision,
        frames,
        height,
        width,
        fps,
        dtype,
        batch_size,
        shard_size,
        negative,
        latents,
        image_condition,
    )
    processes = this_process()
    console = stderr()
    # Only the main process shows progress bars.
    console.quiet = not processes.is_main_process
    with progress_bars(console) as report:
        if videos is not None:
            result = encode_videos(videos, out, config, processes, report, resume)
        else:
            assert prompts is not None
            result = encode_prompts(prompts, out, config, processes, report, resume)
    if result is not None:
        print_result(as_json, result, *_lines(result, out))


def _lines(result: Mapping[str, Any], out: Path) -> list[str]:
    """Summarize what was written and which videos were skipped."""
    if "latents" not in result:
        return [f"wrote {out}: {result['encoded']:,} prompts in {result['shards']:,} files, {result['dtype']}"]
    latents, text = ("x".join(map(str, result[key])) for key in ("latents", "text"))
    lines = [
        f"wrote {out}: {result['encoded']:,} clips in {result['shards']:,} shards, "
        f"{result['stored']} latents {latents} and text {text} in {result['dtype']}"
    ]
    images = ["x".join(map(str, result[key])) for key in _IMAGES if key in result]
    if images:
        lines.append(f"from each first frame: image latents {' and CLIP tokens '.join(images)}")
    skipped = result["skipped"]
    if skipped:
        lines.append(f"skipped {len(skipped):,}, listed in {out / 'skipped.jsonl'}:")
        lines += [f"  {row['file_name']}: {row['reason']}" for row in skipped[:_LISTED]]
        if len(skipped) > _LISTED:
            lines.append(f"  and {len(skipped) - _LISTED:,} more")
    return lines
