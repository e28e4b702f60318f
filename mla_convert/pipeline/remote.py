"""Checks what a recipe names on this machine while its source is still on the Hub."""

from __future__ import annotations

from pathlib import Path

from ..distill.data import DataConfig, LatentClips, open_data
from ..distill.image_columns import COLUMN_OF
from ..distill.negative import find_negative
from ..distill.shard_index import holds_shards, index_shards
from ..errors import UserError
from ..load.hub import is_hub_id
from ..recipe.schema import Recipe
from ..run.parts import PICTURES, TEXT, find_parts
from ..run.sample import prompt_files
from .calibration import calibration_reads_negative
from .clip_size import sized


def taken_from_hub(recipe: Recipe) -> list[str]:
    """The keys of `recipe` whose model is not on this machine, with what they name.

    Raises UserError for one that cannot be on the Hub either.
    """
    named = {"source.model": recipe.source.model, "source.components": recipe.source.components}
    if recipe.real_score is not None:
        named["real_score.model"] = recipe.real_score.model
    missing = {key: name for key, name in named.items() if name is not None and not is_here(name)}
    for key, name in missing.items():
        if not is_hub_id(name):
            raise UserError(f"{key}: {name} is neither an existing path nor a Hub ID (owner/name)")
    return [
        f"{key}: no such folder here as {name}, so it is taken as a Hub ID; not checked"
        for key, name in missing.items()
    ]


def check_beside_source(recipe: Recipe) -> tuple[int, int] | None:
    """Check data, negative prompt and components of a `recipe` whose source cannot be read.

    Returns height and width of the samples' latents if the recipe or its clips fix them. Raises UserError in one line.
    """
    components = recipe.source.components
    if components is not None and is_here(components):
        find_parts(Path(), (*TEXT, *PICTURES) if recipe.generate.prompts else (), components)
    needs_negative = any(stage.needs_negative for stage in recipe.distill) or calibration_reads_negative(recipe)
    clips = _check_clips(recipe.data, recipe.seed, needs_negative)
    generate = sized(recipe.generate, recipe.data, lambda: None if clips is None else clips.shards.index)
    if generate.latent_height is None or generate.latent_width is None:
        return None
    return generate.latent_height, generate.latent_width


def _check_clips(data: DataConfig, seed: int, needs_negative: bool) -> LatentClips | None:
    """Open the clips or prompts that `data` names and read one of them, and the negative prompt if one is named."""
    if data.rollouts is not None:
        _check_prompts(data, needs_negative)
    if data.kind != "latents":
        return None
    index = index_shards(Path(data.folder or ""), None, {name for name in data.skip if isinstance(name, str)})
    found = {key for shard in index.shards for _, shapes in shard.shapes for key, shape in shapes.items() if shape}
    # Whether the model reads the images is not known, but if it does they must fit.
    conditions = [name for name, column in COLUMN_OF.items() if f"{column}_shape" in found]
    clips = open_data(data, seed, conditions, index, skippable=True)
    assert isinstance(clips, LatentClips)
    clips.example(0)
    if needs_negative or data.negative_embeds is not None:
        _ = clips.negative
    return clips


def _check_prompts(data: DataConfig, needs_negative: bool) -> None:
    """Check that the prompts of rollouts, and the negative prompt, are there."""
    assert data.rollouts is not None
    if data.rollouts.prompt_embeds is None:
        return
    place = Path(data.rollouts.prompt_embeds)
    if not place.exists():
        raise UserError(f"data.rollouts.prompt_embeds: {place} does not exist; write it with `mla-convert encode`")
    if not holds_shards(place):
        prompt_files(place)
    negative = find_negative(place, data.negative_embeds)
    if negative is not None and not negative.is_file():
        raise UserError(f"data.negative_embeds: {negative} does not exist; `mla-convert encode --prompts` writes one")
    if negative is None and (needs_negative or data.rollouts.guidance_scale != 1):
        raise UserError("guidance and empty_prompt_rate need a negative prompt; give data.negative_embeds")


def is_here(name: str) -> bool:
    """Whether the model `name` is part of this package or a path that exists."""
    return name.startswith("zoo:") or Path(name).expanduser().exists()
