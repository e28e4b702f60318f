"""Derives for `plan` what the conversion of a recipe would cache; reads no weights and downloads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..convert.config import ConvertConfig
from ..convert.limits import latent_scalars, planned_ranks
from ..distill.shard_index import ShardIndex, index_shards, shard_names
from ..errors import UserError
from ..evaluate.geometry import PRESETS, StreamGeometry, from_model
from ..evaluate.memory import rows_by_layer
from ..families.base import attention_geometry
from ..load import accepted_config
from ..recipe.schema import Recipe, validate
from ..registry import families
from ..run.latents import latent_scale, latent_size
from .clip_size import sized
from .dry_run import PUBLISHED
from .remote import is_here
from .sources import source_of


def recipe_geometry(
    recipe: Recipe, size: tuple[int, int] | None, changes: dict[str, int]
) -> tuple[StreamGeometry, list[tuple[int, int]], str | None]:
    """Geometry of a recipe's source, the scalars of latent and shared key by layer, and what is assumed, if anything.

    `size` is the latent's, by default that of the recipe or its clips; `changes` replace keys of its `convert`
    section. Raises UserError for a source whose shapes are not known here, UsageError for impossible ranks.
    """
    family, config, published = _shapes(recipe)
    with torch.device("meta"):
        dense = family.dense_class.from_config(config)
    height, width = size or latent_size(dense.config, sized(recipe.generate, recipe.data, lambda: _index(recipe)))
    geometry, _ = from_model(dense, height, width, recipe.generate.fps, latent_scale(dense.config).temporal)
    convert = recipe.convert
    if changes:
        budget = {} if "kv_lora_rank" not in changes else {"budget": None}
        convert = validate(ConvertConfig, {**convert.model_dump(), **budget, **changes})
    rows = _rows(dense, convert)
    assumed = None if published is None else f"shapes are those of the published {published}; the weights are not here"
    return geometry.model_copy(update={"name": recipe.name}), rows, assumed


def _shapes(recipe: Recipe) -> tuple[Any, dict[str, Any], str | None]:
    """Family and configuration of the source, and the published model that they are taken from if it is not here."""
    first = next(iter(recipe.experts or ()), None)
    section = (recipe if first is None else recipe.expert(first)).source
    if is_here(section.model):
        source = source_of(section, recipe.causal)
        return source.family, dict(source.config), None
    published = next((name for name in PUBLISHED if name in section.model.lower()), None)
    if published is None:
        raise UserError(
            f"source.model: {section.model} is not on this machine, and its shapes are not known without it; plan with "
            f"--preset {', '.join(PRESETS)} and --kv-lora-rank"
        )
    family = families()["wan"]
    config = accepted_config(family.dense_class, PUBLISHED[published])
    if recipe.causal is not None:
        config["causal"] = recipe.causal.model_dump(mode="json")
    return family, config, published


def _index(recipe: Recipe) -> ShardIndex | None:
    folder = Path(recipe.data.folder or "")
    return index_shards(folder) if shard_names(folder) else None


def _rows(dense: Any, convert: ConvertConfig) -> list[tuple[int, int]]:
    """Scalars of latent and shared key that each layer caches; a shared latent is in the first of its layers."""
    geometry = attention_geometry(dense.config)
    ranks = planned_ranks(geometry, dense.rotary_table().axes, convert).fitted
    if convert.budget is not None:
        mean = latent_scalars(geometry, convert)
        if mean is None:
            raise UserError("convert.budget: loss_increase chooses ranks by measurement; give --kv-lora-rank")
        ranks = [round(mean)] * geometry.num_layers
    return rows_by_layer(ranks, convert.cached_key, convert.layers_per_latent)
