"""`mla-convert plan`: computes cache memory before anything is converted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from ..sizes import GPU_GIGABYTES
from .options import Cache, Json, Preset, dtype_parser, parse_cache, parse_size
from .output import print_result

if TYPE_CHECKING:
    from ..evaluate.geometry import StreamGeometry


def plan(
    source: Annotated[
        str | None, typer.Argument(help="A dense or converted model: zoo:digits, a folder, a file or a Hub ID.")
    ] = None,
    file: Annotated[str | None, typer.Option(help="Weights file in SOURCE, such as checkpoints/model.pt.")] = None,
    preset: Preset = None,
    kv_lora_rank: Annotated[
        int | None, typer.Option(help="Latent scalars per token; by default the paper's share of the dense cache.")
    ] = None,
    qk_rope_head_dim: Annotated[int | None, typer.Option(help="Cached channels of the shared rotary key.")] = None,
    frames: Annotated[int | None, typer.Option(help="Window in latent frames.")] = None,
    tokens_per_frame: Annotated[int | None, typer.Option(help="Tokens of one latent frame.")] = None,
    latent_size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Latent height and width of SOURCE; 60x104 (480p) for Wan.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            parser=dtype_parser("--dtype"),
            metavar="DTYPE",
            help="Data type of the cache and the weights: float32, bfloat16 or float16.",
        ),
    ] = "bfloat16",
    gpu: Annotated[
        str, typer.Option(help=f"A GPU ({', '.join(GPU_GIGABYTES)}), or its memory, such as 80GB.")
    ] = "H100",
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Compute cache bytes, streams per GPU and seconds of context, dense against latent."""
    from ..evaluate.geometry import PAPER_SHARE
    from ..evaluate.geometry import preset as find_preset
    from ..evaluate.memory import plan as plan_memory
    from ..evaluate.memory import plan_table

    if (source is None) == (preset is None):
        raise UsageError("give exactly one of SOURCE and --preset")
    rows: int | list[int] | None = kv_lora_rank
    keys: list[int] | None = None
    if preset is not None:
        for option, value in (("--latent-size", latent_size), ("--file", file)):
            if value is not None:
                raise UsageError(f"{option} is for SOURCE; a preset takes --tokens-per-frame and --frames")
        found = find_preset(preset)
        geometry = found.geometry
        rows = found.kv_lora_rank if rows is None else rows
        qk_rope_head_dim = found.qk_rope_head_dim if qk_rope_head_dim is None else qk_rope_head_dim
    else:
        assert source is not None
        geometry, cached = _read(source, file, latent_size)
        if cached is not None:
            if rows is not None or qk_rope_head_dim is not None:
                raise UsageError(f"{source} is already converted; leave out --kv-lora-rank and --qk-rope-head-dim")
            rows, keys = (list(parts) for parts in zip(*cached, strict=True))
        elif rows is None:
            rows = round(2 * geometry.inner_dim * PAPER_SHARE) - (qk_rope_head_dim or 0)
    result = plan_memory(
        geometry,
        rows,
        keys or qk_rope_head_dim or 0,
        frames=frames,
        tokens_per_frame=tokens_per_frame,
        dtype=dtype,
        gpu=gpu,
        cache="auto" if cache is None else parse_cache(cache),
    )
    print_result(as_json, result.model_dump(mode="json"), plan_table(result))


def _read(
    source: str, file: str | None, latent_size: str | None
) -> tuple[StreamGeometry, list[tuple[int, int]] | None]:
    """Geometry of a model, and for a converted one the sizes of latent and shared key that each layer caches."""
    from ..pipeline.planning import read_geometry

    return read_geometry(source, None if latent_size is None else parse_size(latent_size), file)
