"""Provides geometries for `plan`: presets of models and GPUs by name, and the geometry of any causal model."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from ..errors import UsageError, nearest
from ..sizes import GPU_GIGABYTES

if TYPE_CHECKING:
    from ..families.causal import CausalTransformer

PAPER_SCALARS = 3072
"""Scalars that dense Wan2.1-1.3B caches per token per layer."""
PAPER_SHARE = 224 / PAPER_SCALARS
"""Ratio of latent to dense scalars in VideoMLA (arXiv 2605.30351)."""


class StreamGeometry(BaseModel):
    """Sizes that determine the cache of a streaming video transformer: layers, heads, tokens, frames.

    `window_frames` and `num_frames_per_block` count latent frames. The first latent frame holds one video frame, each
    later one `temporal_compression`. The rotary table, `rope_max_seq_len`, limits the window. `parameters` counts
    those of the transformer. A model that compresses its far history caches `far_tokens_per_frame` tokens for all but
    the latest `near_frames` frames.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    tokens_per_frame: int
    window_frames: int
    num_frames_per_block: int = 3
    temporal_compression: int = 4
    fps: float = 16
    rope_max_seq_len: int = 1024
    parameters: int = 0
    far_tokens_per_frame: int | None = None
    near_frames: int = 0

    def cached_tokens(self, frames: int) -> int:
        """The number of tokens cached for a window of `frames` latent frames."""
        if self.far_tokens_per_frame is None:
            return frames * self.tokens_per_frame
        near = min(frames, self.near_frames)
        # The current chunk is not cached, and a shorter one leaves room for a longer history.
        far = max(0, frames - 2 - near + self.num_frames_per_block)
        return near * self.tokens_per_frame + far * self.far_tokens_per_frame

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def seconds(self, frames: int) -> float:
        """The seconds of video in `frames` latent frames."""
        return (1 + self.temporal_compression * (frames - 1)) / self.fps if frames > 0 else 0.0


class Preset(BaseModel):
    """A known model, and the `kv_lora_rank` and `qk_rope_head_dim` that `plan` assumes for its cache rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    geometry: StreamGeometry
    kv_lora_rank: int
    qk_rope_head_dim: int


def _wan_1_3b(name: str, **changes: Any) -> Preset:
    shape = {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128}
    video = {"tokens_per_frame": 1560, "window_frames": 21}
    return Preset(
        geometry=StreamGeometry(name=name, **(shape | video | changes)), kv_lora_rank=192, qk_rope_head_dim=32
    )


def _wan_14b(name: str, **changes: Any) -> Preset:
    shape = {"num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128}
    video = {"tokens_per_frame": 1560, "window_frames": 21}
    # The rank is the paper's share of the dense cache, rounded down to a multiple of 64.
    return Preset(
        geometry=StreamGeometry(name=name, **(shape | video | changes)), kv_lora_rank=704, qk_rope_head_dim=32
    )


_SKYREELS = {"tokens_per_frame": 2040, "window_frames": 25, "num_frames_per_block": 5, "fps": 24}
_DIGITS = StreamGeometry(
    name="digits",
    num_layers=4,
    num_attention_heads=6,
    attention_head_dim=32,
    tokens_per_frame=16,
    window_frames=10,
    temporal_compression=1,
    fps=8,
    parameters=2_306_256,
)

PRESETS = {
    preset.geometry.name: preset
    for preset in (
        _wan_1_3b("wan2.1-t2v-1.3b", parameters=1_418_996_800),
        _wan_14b("wan2.1-t2v-14b", parameters=14_288_491_584),
        _wan_1_3b("anyflow-far-1.3b", parameters=1_422_147_136, far_tokens_per_frame=390, near_frames=6),
        _wan_1_3b("skyreels-v2-1.3b", parameters=1_435_525_696, **_SKYREELS),
        _wan_14b("skyreels-v2-14b", parameters=14_288_491_584, **_SKYREELS),
        Preset(geometry=_DIGITS, kv_lora_rank=20, qk_rope_head_dim=8),
    )
}
"""480x832 at 16 frames/s for Wan and AnyFlow, 544x960 at 24 frames/s for SkyReels (their public
configurations in diffusers); 16x16 pixels for the digits."""


def preset(name: str) -> Preset:
    """The preset called `name`. Raises UsageError that suggests the nearest name."""
    if name in PRESETS:
        return PRESETS[name]
    raise UsageError(f"unknown preset {name!r}; {nearest(name, PRESETS)}")


def gpu_memory(text: str) -> tuple[str, int]:
    """Label and memory in bytes of a GPU, given by name (`h100`, `A100-40`) or size (`80`, `80GB`, `79.1GiB`).

    Raises UsageError for an unknown GPU.
    """
    size = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(gi?b?)?\s*", text.lower())
    if size and (size[2] or float(size[1]) < 1000):
        if not float(size[1]):
            raise UsageError(f"a GPU of {text.strip()} has no memory; give a size above 0, such as 80GB")
        unit = 2**30 if (size[2] or "").startswith("gi") else 10**9
        return f"{size[1]} {'GiB' if unit == 2**30 else 'GB'}", round(float(size[1]) * unit)
    known = {_squeezed(name): name for name in GPU_GIGABYTES}
    name = known.get(_squeezed(text).removesuffix("gb"))
    if name is None:
        # Suggest display names, not the squeezed keys; a name without its size matches all of its sizes.
        prefixed = [shown for key, shown in known.items() if _squeezed(text) and key.startswith(_squeezed(text))]
        close = prefixed or [known[key] for key in difflib.get_close_matches(_squeezed(text), list(known), n=1)]
        near = f", did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise UsageError(f"unknown GPU {text!r}{near}; give a size such as 80GB or one of {', '.join(GPU_GIGABYTES)}")
    label = name if name.endswith(f" {GPU_GIGABYTES[name]}") else f"{name} {GPU_GIGABYTES[name]}"
    return f"{label} GB", GPU_GIGABYTES[name] * 10**9


def from_model(
    model: CausalTransformer, height: int, width: int, fps: float = 16, temporal_compression: int = 4
) -> tuple[StreamGeometry, list[int]]:
    """The geometry of a causal model, dense or converted, and its cached scalars per token by layer.

    `height` and `width` are those of the latent. Pass the second value to `plan` as `kv_lora_rank`, with
    `qk_rope_head_dim` 0. Raises UsageError for a model without a finite window.
    """
    rows, columns = model.token_grid(height, width)
    if model.causal.window_frames is None:
        raise UsageError("the model has no finite window, so its cache has no fixed size; set causal.window_frames")
    geometry = StreamGeometry(
        name=type(model).__name__,
        num_layers=model.config.num_layers,
        num_attention_heads=model.config.num_attention_heads,
        attention_head_dim=model.config.attention_head_dim,
        tokens_per_frame=rows * columns,
        window_frames=model.causal.window_frames,
        num_frames_per_block=model.causal.num_frames_per_block,
        temporal_compression=temporal_compression,
        fps=fps,
        rope_max_seq_len=model.rotary_table().max_len,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        **model.far_history(height, width),
    )
    return geometry, model.row_widths


def _squeezed(name: str) -> str:
    return re.sub(r"[\s_-]", "", name.lower())
