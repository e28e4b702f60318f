"""Translates tensor names and configurations of the Wan repository's layout into diffusers'.

The research models built on Wan (Self-Forcing, CausVid, Causal-Forcing, LongLive) use the Wan repository's tensor names
and its `WanModel` configuration, if any.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from ..errors import UserError
from .base import Config, Shapes

# Heads by hidden size of the published models. QK-norm spans all heads, so no shape depends on their number.
PUBLISHED_HEADS = {1536: 12, 3072: 24, 5120: 40}

# Diffusers' names to the Wan repository's, `*` for the number of a block; other names are the same in both.
ORIGINAL_NAMES = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
    "blocks.*.scale_shift_table": "blocks.*.modulation",
    "blocks.*.norm2": "blocks.*.norm3",
    "blocks.*.ffn.net.0.proj": "blocks.*.ffn.0",
    "blocks.*.ffn.net.2": "blocks.*.ffn.2",
    **{
        f"blocks.*.{ours}.{projection}": f"blocks.*.{theirs}.{original}"
        for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for projection, original in (
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "o"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    },
    "blocks.*.attn2.add_k_proj": "blocks.*.cross_attn.k_img",
    "blocks.*.attn2.add_v_proj": "blocks.*.cross_attn.v_img",
    "blocks.*.attn2.norm_added_k": "blocks.*.cross_attn.norm_k_img",
}
_DIFFUSERS_NAMES = {original: ours for ours, original in ORIGINAL_NAMES.items()}

_CONTROL = "its control blocks are not part of the causal model"
_ANIMATE = "its motion encoder and face adapter are not part of the causal model"
_AUDIO = "its audio layers are not part of the causal model"
_FUN = "its control latents are not part of the causal model"
_ACTIONS = "the action modules of Matrix-Game are not part of the causal model"
_CAMERA = "the camera layers of LingBot-World are not part of the causal model"
_HELIOS = "Helios recomputes its history in every pass, so it has no KV cache to shrink"

NEAR_MISSES = {
    "WanVACETransformer3DModel": _CONTROL,
    "VaceWanModel": _CONTROL,
    "WanAnimateTransformer3DModel": _ANIMATE,
    "WanAnimateModel": _ANIMATE,
    "WanAnimate2Transformer3DModel": "its in-context reference blocks are not part of the causal model",
    "WanModel_S2V": _AUDIO,
    "WanModelFast": _CAMERA,
    "CausalLingBotWorldTransformer3DModel": _CAMERA,
    "HeliosTransformer3DModel": _HELIOS,
}
NEAR_MISS_TENSORS = {
    "vace_blocks": _CONTROL,
    "vace_patch_embedding": _CONTROL,
    "motion_encoder": _ANIMATE,
    "face_adapter": _ANIMATE,
    "pose_patch_embedding": _ANIMATE,
    "audio_injector": _AUDIO,
    "casual_audio_encoder": _AUDIO,
    "audio_proj": _AUDIO,
    "control_adapter": _FUN,
    "ref_conv": _FUN,
    # Matrix-Game 3 also has LingBot-World's camera layers.
    "action_model": _ACTIONS,
    "cam_injector_layer1": _CAMERA,
    "patch_embedding_wancamctrl": _CAMERA,
    "patch_short": _HELIOS,
}
_MODEL_TYPES = {"t2v": None, "i2v": None, "flf2v": None, "ti2v": None, "vace": _CONTROL, "s2v": _AUDIO}
# Image-to-video models also read a 4-channel mask and the image's latent.
_MASK_CHANNELS = 4


def stored_names(names: Collection[str]) -> dict[str, str] | None:
    """Map diffusers' names to those of a file in the Wan repository's layout; None for any other layout."""
    if not any(name.endswith(".self_attn.q.weight") for name in names):
        return None
    return {_translate(name, _DIFFUSERS_NAMES): name for name in names}


def original_names(names: Collection[str]) -> dict[str, str]:
    """Map the Wan repository's names to diffusers' `names`: the inverse of `stored_names`."""
    return {_translate(name, ORIGINAL_NAMES): name for name in names}


def _translate(name: str, table: Mapping[str, str]) -> str:
    """`name` in the other layout; names missing from `table` are unchanged."""
    block = re.match(r"blocks\.(\d+)\.", name)
    pattern = name if block is None else f"blocks.*.{name[block.end() :]}"
    module, _, parameter = pattern.rpartition(".")
    renamed = table.get(pattern) or (f"{table[module]}.{parameter}" if module in table else pattern)
    return renamed if block is None else renamed.replace("*", block[1], 1)


def infer_config(shapes: Shapes) -> dict[str, Any] | None:
    """Stock configuration derived from shapes under diffusers' names; None if they are not Wan's.

    Raises UserError for a hidden size that no published model has, and for control latents.
    """
    read = _from_shapes(shapes)
    if read is None:
        return None
    hidden = shapes["patch_embedding.weight"][0]
    if hidden not in PUBLISHED_HEADS:
        raise UserError(
            f"the number of heads of a Wan model with hidden size {hidden} cannot be read from its tensors; "
            "put the model's config.json beside the file"
        )
    _check_channels(read["in_channels"], read["out_channels"])
    heads = PUBLISHED_HEADS[hidden]
    return {**read, "num_attention_heads": heads, "attention_head_dim": hidden // heads}


def stock_config(stored: Config, shapes: Shapes) -> dict[str, Any] | None:
    """Stock configuration for that of a `WanModel`, `CausalWanModel` or FastVideo's causal model; None for others.

    `shapes` are under diffusers' names, and empty while unknown. They supply what the configuration leaves out (text
    width, image embedder). `num_frame_per_block`, `local_attn_size` and `sink_size` become `causal`. Raises UserError
    for a model type that cannot be converted.
    """
    if "num_attention_heads" in stored:
        return _from_fastvideo(stored)
    if "num_heads" not in stored:
        return None
    kind = stored.get("model_type", "t2v")
    reason = _MODEL_TYPES.get(kind, f"this type is not one of {', '.join(_MODEL_TYPES)}")
    if reason is not None:
        raise UserError(f"a Wan model of type {kind} cannot be converted: {reason}")
    sizes = {}
    for key in ("dim", "num_heads", "num_layers", "ffn_dim", "freq_dim", "in_dim", "out_dim"):
        if not isinstance(stored.get(key), int) or stored[key] < 1:
            raise UserError(f"{key} is missing from the WanModel configuration, or it is not a positive integer")
        sizes[key] = stored[key]
    _check_channels(sizes["in_dim"], sizes["out_dim"])
    config = {
        **(_from_shapes(shapes) or {}),
        "num_attention_heads": sizes["num_heads"],
        "attention_head_dim": sizes["dim"] // sizes["num_heads"],
        "in_channels": sizes["in_dim"],
        "out_channels": sizes["out_dim"],
        "freq_dim": sizes["freq_dim"],
        "ffn_dim": sizes["ffn_dim"],
        "num_layers": sizes["num_layers"],
        "eps": stored.get("eps", 1e-6),
    }
    for key in ("patch_size", "text_dim", "causal"):
        if key in stored:
            config[key] = stored[key]
    causal = _causal(stored)
    return {"causal": causal, **config} if causal else config


def _causal(stored: Config) -> dict[str, Any]:
    """The `causal` section for the keys of Self-Forcing's `CausalWanModel`; empty if it has none of them.

    A `local_attn_size` of -1 means a cache of 21 frames. The model caches rotated keys (arXiv 2506.08009), so sinks
    keep their place in the video.
    """
    causal = {}
    for key, theirs in (
        ("num_frames_per_block", "num_frame_per_block"),
        ("sink_frames", "sink_size"),
        ("independent_first_frame", "independent_first_frame"),
    ):
        if theirs in stored:
            causal[key] = stored[theirs]
    if "local_attn_size" in stored:
        causal["window_frames"] = 21 if stored["local_attn_size"] == -1 else stored["local_attn_size"]
    if causal.get("sink_frames"):
        causal["sink_positions"] = "absolute"
    return causal


def _from_fastvideo(stored: Config) -> dict[str, Any] | None:
    """A configuration in diffusers' keys, with FastVideo's additional keys translated to a `causal` section.

    None for a configuration without these keys, or with a `causal` section of its own. FastVideo's
    `CausalWanTransformer3DModel` attends to 21 frames with `local_attn_size: -1`. With the cache policy `relativistic`,
    it indexes the frames of a window from 0, like `sink_positions: window`; otherwise each frame has the index of its
    place in the video. Raises UserError for another policy.
    """
    keys = ("num_frames_per_block", "local_attn_size", "sink_size", "rope_cache_policy")
    if stored.get("causal") is not None or not any(stored.get(key) is not None for key in keys):
        return None
    theirs = {"num_frame_per_block": stored.get("num_frames_per_block"), **{key: stored.get(key) for key in keys[1:3]}}
    policy = stored.get("rope_cache_policy") or "absolute"
    if policy not in ("absolute", "relativistic"):
        raise UserError(f"rope_cache_policy {policy} is not supported; use absolute or relativistic")
    causal = _causal({key: value for key, value in theirs.items() if value is not None})
    if policy == "relativistic":
        causal["sink_positions"] = "window"
    return {**{key: value for key, value in stored.items() if key not in keys}, "causal": causal}


def _check_channels(in_channels: int, out_channels: int) -> None:
    if in_channels not in (out_channels, 2 * out_channels + _MASK_CHANNELS):
        raise UserError(
            f"a Wan model of {in_channels} input and {out_channels} output channels cannot be converted: {_FUN}"
        )


def _from_shapes(shapes: Shapes) -> dict[str, Any] | None:
    """The part of a stock configuration that shapes determine: all but the heads. None if they are not Wan's."""
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
    _, in_channels, *patch = shape["patch"]
    image = shapes.get("condition_embedder.image_embedder.ff.net.0.proj.weight")
    added = shapes.get("blocks.0.attn2.add_k_proj.weight")
    place = shapes.get("condition_embedder.image_embedder.pos_embed")
    return {
        "patch_size": list(patch),
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
