"""`mla-convert bench`: times streaming attention on this machine, dense against latent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import UsageError
from .options import Json, Preset, dtype_parser
from .output import print_result, stderr


def bench(
    source: Annotated[str | None, typer.Argument(metavar="[DIR]", help="A converted or dense model.")] = None,
    preset: Preset = None,
    kv_lora_rank: Annotated[int | None, typer.Option(min=1, help="Latent scalars per token.")] = None,
    layers_per_latent: Annotated[int | None, typer.Option(min=1, help="Layers that share the latent.")] = None,
    qk_rope_head_dim: Annotated[int | None, typer.Option(min=0, help="Channels of the shared rotary key.")] = None,
    position: Annotated[
        Literal["decoupled", "derived", "baked", "rotate_on_read"] | None,
        typer.Option(metavar="LAYOUT", help="decoupled, derived, baked or rotate_on_read, the default."),
    ] = None,
    own_chunk: Annotated[
        Literal["exact", "latent"] | None, typer.Option(help="How a chunk attends to itself; exact by default.")
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Window in latent frames.")] = None,
    tokens_per_frame: Annotated[int | None, typer.Option(min=1, help="Tokens of one latent frame.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Streams at once.")] = 1,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Denoising steps per chunk; by default those of DIR's recipe, else 4."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            parser=dtype_parser("--dtype"),
            metavar="DTYPE",
            help="float32 (on a GPU without kernels), bfloat16 or float16; by default bfloat16 on a GPU, else float32.",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; by default the GPU if there is one.")] = None,
    kernels: Annotated[Literal["auto", "triton", "torch"], typer.Option(help="What computes attention.")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds per variant.")] = 5,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write the result to this file, as JSON.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time one layer's attention over all passes of a chunk with a full window, dense against latent."""
    if (source is None) == (preset is None):
        raise UsageError("give exactly one of DIR and --preset")
    with stderr().status("loading PyTorch"):
        from ..distill.progress import progress_bars
        from ..evaluate.bench import BenchConfig
        from ..evaluate.bench import bench as bench_attention
        from ..evaluate.bench_table import bench_table
        from ..files import check_place, write_json
        from ..pipeline.planning import bench_settings
        from ..recipe.schema import validate
    geometry, settings = bench_settings(source, preset)
    sizes = {"window_frames": frames, "tokens_per_frame": tokens_per_frame}
    geometry = geometry.model_copy(update={key: value for key, value in sizes.items() if value is not None})
    options: dict[str, Any] = {
        "kv_lora_rank": kv_lora_rank,
        "layers_per_latent": layers_per_latent,
        "qk_rope_head_dim": qk_rope_head_dim,
        "position": position,
        "own_chunk": own_chunk,
        "num_inference_steps": steps,
    }
    settings |= {key: value for key, value in options.items() if value is not None}
    if settings.get("position", "rotate_on_read") == "rotate_on_read":
        if qk_rope_head_dim:
            raise UsageError(
                "rotate_on_read has no shared rotary key; leave --qk-rope-head-dim out, or give another --position"
            )
        # DIR's own, if --position changed its layout.
        settings.pop("qk_rope_head_dim", None)
    settings |= {"batch_size": batch_size, "dtype": dtype, "device": device, "kernels": kernels, "repeats": repeats}
    config = validate(BenchConfig, settings)
    if out is not None:
        check_place(out)
    with progress_bars(stderr()) as report:
        result = bench_attention(geometry, config, lambda done, total: report("bench", done, total, ""))
    if out is not None:
        write_json(out, result)
    print_result(as_json, result, bench_table(result))
