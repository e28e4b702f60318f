"""Wan checkpoints that come without a diffusers configuration: names and geometry from the file itself."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from ..errors import UserError
from .base import Shapes

# Heads by hidden size of the published models; QK-norm runs over all heads, so no shape tells them.
PUBLISHED_HEADS = {1536: 12, 3072: 24, 5120: 40}


def stored_names(names: Collection[str]) -> dict[str, str] | None:
    """Diffusers' names to those of a file in the Wan repository's layout; None for any other layout."""
    if not any(".self_attn.q.weight" in name for name in names):
        return None
    if any("motion_encoder" in name or "face_adapter" in name for name in names):
        return None
    renamed: dict[str, str] = convert_wan_transformer_to_diffusers({name: name for name in names})
    return renamed


def infer_config(shapes: Shapes) -> dict[str, Any] | None:
    """Stock configuration from shapes under diffusers' names; None if they are not Wan's.

    Raises UserError when the hidden size is not that of a published model.
    """
    needed = {
        "patch": "patch_embedding.weight",
        "ffn": "blocks.0.ffn.net.0.proj.weight",
        "text": "condition_embedder.text_embedder.linear_1.weight",
        "time": "condition_embedder.time_embedder.linear_1.weight",
        "out": "proj_out.weight",
        "query": "blocks.0.attn1.to_q.weight",
    }
    if not all(name in shapes for name in needed.values()):
        return None
    shape = {key: shapes[name] for key, name in needed.items()}
    hidden, in_channels, *patch = shape["patch"]
    if hidden not in PUBLISHED_HEADS:
        raise UserError(
            f"the number of heads of a Wan model with hidden size {hidden} cannot be read from its tensors; "
            "put the model's config.json beside the file"
        )
    image = shapes.get("condition_embedder.image_embedder.ff.net.0.proj.weight")
    added = shapes.get("blocks.0.attn2.add_k_proj.weight")
    place = shapes.get("condition_embedder.image_embedder.pos_embed")
    return {
        "patch_size": list(patch),
        "num_attention_heads": PUBLISHED_HEADS[hidden],
        "attention_head_dim": hidden // PUBLISHED_HEADS[hidden],
        "in_channels": in_channels,
        "out_channels": shape["out"][0] // math.prod(patch),
        "text_dim": shape["text"][1],
        "freq_dim": shape["time"][1],
        "ffn_dim": shape["ffn"][0],
        "num_layers": 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "image_dim": image[1] if image else None,
        "added_kv_proj_dim": added[1] if added else None,
        "pos_embed_seq_len": place[1] if place else None,
    }
