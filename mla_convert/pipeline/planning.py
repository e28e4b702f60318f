"""Derives a model's geometry from its configuration, for `plan` and `bench`; reads no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .. import registry
from ..errors import UserError
from ..evaluate.geometry import PAPER_SHARE, StreamGeometry, from_model
from ..evaluate.geometry import preset as find_preset
from ..export.checkpoint import find_checkpoint, load_shape
from ..export.manifest import recorded_section
from ..load import known_config, load_source
from ..run.config import GenerateConfig
from ..run.latents import DIGITS, latent_scale, latent_size, prompt_encoder


def read_geometry(
    source: str, size: tuple[int, int] | None, file: str | None = None
) -> tuple[StreamGeometry, list[tuple[int, int]] | None]:
    """Geometry of a model, and for a converted one each layer's cached scalars: latent and shared key.

    The second value is None for a dense model. `size` is the height and width of the latent, `file` a weights file
    in a dense model's folder. Raises UserError in one line.
    """
    model = None if file is not None else _converted(Path(source))
    rows = None
    if model is None:
        dense = load_source(source, file=file)
        with torch.device("meta"):
            model = dense.family.dense_class.from_config(dense.config)
    else:
        rows = [model.mla.row_parts(layer) for layer in range(len(model.blocks))]
    fps = 8 if prompt_encoder(model.config) == DIGITS else 16
    height, width = size or latent_size(model.config, GenerateConfig())
    try:
        geometry, _ = from_model(model, height, width, fps, latent_scale(model.config).temporal)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    return geometry.model_copy(update={"name": source}), rows


def bench_settings(source: str | None, preset: str | None) -> tuple[StreamGeometry, dict[str, Any]]:
    """Geometry and keys of a `BenchConfig` from a model or a preset; of a converted model, the layer of median rank.

    Raises UserError or UsageError in one line.
    """
    if preset is not None:
        found = find_preset(preset)
        rank, shared = found.kv_lora_rank, found.qk_rope_head_dim
        # The default layout has no shared key, so the preset's whole row goes to the latent.
        return found.geometry, {"position": "rotate_on_read", "kv_lora_rank": rank + shared}
    assert source is not None
    geometry, rows = read_geometry(source, None)
    if rows is None:
        return geometry, {"kv_lora_rank": max(1, round(2 * geometry.inner_dim * PAPER_SHARE))}
    mla = _converted(Path(source)).mla
    layer = sorted(range(len(rows)), key=lambda index: mla.kv_lora_rank[index])[len(rows) // 2]
    settings = {"position": mla.position, "own_chunk": mla.own_chunk, "kv_lora_rank": mla.kv_lora_rank[layer]}
    settings |= {"layers_per_latent": mla.layers_per_latent}
    settings |= _steps(Path(source))
    return geometry, settings | {"qk_rope_head_dim": mla.qk_rope_head_dim(layer)}


def _steps(folder: Path) -> dict[str, int]:
    """Steps per chunk in the recipe that made a checkpoint, as a key of a `BenchConfig`; empty if unknown."""
    generate = recorded_section(find_checkpoint(folder)[0], "generate")
    levels, steps = generate.get("denoising_steps"), generate.get("num_inference_steps")
    if levels:
        return {"num_inference_steps": len(levels)}
    return {} if steps is None else {"num_inference_steps": steps}


def _converted(folder: Path) -> Any:
    """The converted model in `folder` on the meta device; None if there is none."""
    if not folder.is_dir():
        return None
    try:
        _, inner = find_checkpoint(folder)
    except UserError:
        return None
    converted = {family.mla_class.__name__ for family in registry.families().values()}
    return load_shape(folder, dtypes=False) if known_config(inner).get("_class_name") in converted else None
