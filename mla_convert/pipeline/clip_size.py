"""Sizes what a run samples and counts like the run's clips, unless the recipe says another size."""

from __future__ import annotations

from collections.abc import Callable

from ..distill.clip_shards import LATENT
from ..distill.data import Data, DataConfig, LatentClips
from ..distill.shard_index import ShardIndex
from ..run.config import GenerateConfig


def sized(generate: GenerateConfig, data: DataConfig, index: Callable[[], ShardIndex | None]) -> GenerateConfig:
    """`generate` with the latent height and width of the clips that `data` names where it leaves them out.

    `index` returns that of the clips, or None; it is called only for clips of a folder. Digits, and rollouts of the
    model's own size, leave `generate` as it is.
    """
    if generate.latent_height is not None and generate.latent_width is not None:
        return generate
    height: int | None = None
    width: int | None = None
    if data.rollouts is not None:
        height, width = data.rollouts.latent_height, data.rollouts.latent_width
    elif data.kind == "latents":
        height, width = _size_in(index())
    return generate.model_copy(
        update={
            "latent_height": generate.latent_height or height,
            "latent_width": generate.latent_width or width,
        }
    )


def index_of(data: Data) -> ShardIndex | None:
    """The index of open clips; None for clips that are made as they are needed."""
    return data.shards.index if isinstance(data, LatentClips) else None


def _size_in(index: ShardIndex | None) -> tuple[int | None, int | None]:
    """Height and width of the latents that an index has seen; all clips of a folder have one shape."""
    shards = () if index is None else index.shards
    for shape in (shapes.get(f"{LATENT}_shape") for shard in shards for _, shapes in shard.shapes):
        if shape is not None and len(shape) == 4:
            return shape[2], shape[3]
    return None, None
