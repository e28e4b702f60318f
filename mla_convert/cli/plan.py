"""`mla-convert plan`: computes cache memory before anything is converted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeGuard

import typer

from ..errors import UsageError
from ..recipe.shipped import find_recipe, shipped_recipes
from ..sizes import GPU_GIGABYTES
from .options import Cache, Json, Preset, dtype_parser, parse_cache, parse_size
from .output import print_result, stderr

if TYPE_CHECKING:
    from ..evaluate.geometry import StreamGeometry


def plan(
    source: Annotated[
        str | None,
        typer.Argument(help="A dense or converted model: zoo:digits, a folder, a file or a Hub ID; or a recipe."),
    ] = None,
    file: Annotated[str | None, typer.Option(help="Weights file in SOURCE, such as checkpoints/model.pt.")] = None,
    preset: Preset = None,
    kv_lora_rank: Annotated[
        int | None, typer.Option(help="Latent scalars per token; by default the paper's share of the dense cache.")
    ] = None,
    qk_rope_head_dim: Annotated[int | None, typer.Option(help="Cached channels of the shared rotary key.")] = None,
    layers_per_latent: Annotated[
        int | None, typer.Option(min=1, help="Layers that share a latent; --kv-lora-rank is then that of all of them.")
    ] = None,
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
    from ..evaluate.memory import plan_table, rows_by_layer

    if (source is None) == (preset is None):
        raise UsageError("give exactly one of SOURCE and --preset")
    rank = kv_lora_rank
    cached: list[tuple[int, int]] | None = None
    assumed: str | None = None
    if preset is not None:
        for option, value in (("--latent-size", latent_size), ("--file", file)):
            if value is not None:
                raise UsageError(f"{option} is for SOURCE; a preset takes --tokens-per-frame and --frames")
        found = find_preset(preset)
        geometry = found.geometry
        rank = found.kv_lora_rank * (layers_per_latent or 1) if rank is None else rank
        qk_rope_head_dim = found.qk_rope_head_dim if qk_rope_head_dim is None else qk_rope_head_dim
    elif is_recipe(source):
        changes = {
            "kv_lora_rank": kv_lora_rank,
            "layers_per_latent": layers_per_latent,
            "qk_rope_head_dim": qk_rope_head_dim,
        }
        geometry, cached, assumed = _of_recipe(
            source, file, latent_size, {key: value for key, value in changes.items() if value is not None}
        )
    else:
        assert source is not None
        geometry, cached = _read(source, file, latent_size)
        if cached is not None:
            if rank is not None or qk_rope_head_dim is not None or layers_per_latent is not None:
                raise UsageError(
                    f"{source} is already converted; leave out --kv-lora-rank, --qk-rope-head-dim and "
                    "--layers-per-latent"
                )
        elif rank is None:
            rank = round(2 * geometry.inner_dim * PAPER_SHARE * (layers_per_latent or 1)) - (qk_rope_head_dim or 0)
    if cached is None:
        assert rank is not None
        cached = rows_by_layer([rank] * geometry.num_layers, qk_rope_head_dim or 0, layers_per_latent or 1)
    latents, keys = zip(*cached, strict=True)
    result = plan_memory(
        geometry,
        latents,
        keys,
        frames=frames,
        tokens_per_frame=tokens_per_frame,
        dtype=dtype,
        gpu=gpu,
        cache="auto" if cache is None else parse_cache(cache),
    )
    if assumed is not None:
        result = result.model_copy(update={"assumptions": [*result.assumptions, assumed]})
    print_result(as_json, result.model_dump(mode="json"), plan_table(result))


def is_recipe(source: str | None) -> TypeGuard[str]:
    """Whether `source` is a recipe file, or the name of a shipped recipe and of no path."""
    if source is None or Path(source).is_dir():
        return False
    return Path(source).suffix in (".yaml", ".yml") or (not Path(source).exists() and source in shipped_recipes())


def _of_recipe(
    source: str, file: str | None, latent_size: str | None, changes: dict[str, int]
) -> tuple[StreamGeometry, list[tuple[int, int]], str | None]:
    """What the recipe `source` would cache, with `changes` of its `convert` section; see `recipe_geometry`."""
    if file is not None:
        raise UsageError("--file is for a model; a recipe names its own in source.file")
    from ..recipe.load import load_recipe

    path = find_recipe(source)
    with stderr().status("loading PyTorch"):
        recipe = load_recipe(path)
        from ..pipeline.recipe_plan import recipe_geometry
    return recipe_geometry(recipe, None if latent_size is None else parse_size(latent_size), changes)


def _read(
    source: str, file: str | None, latent_size: str | None
) -> tuple[StreamGeometry, list[tuple[int, int]] | None]:
    """Geometry of a model, and for a converted one the sizes of latent and shared key that each layer caches."""
    from ..pipeline.planning import read_geometry

    return read_geometry(source, None if latent_size is None else parse_size(latent_size), file)
