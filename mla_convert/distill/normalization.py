"""Normalizes raw VAE latents for a transformer, and detects whether stored latents are raw.

A transformer takes latents minus the mean of each channel, divided by its standard deviation. FastVideo stores the
encoder's output (`EncodingStage`, `vae.encode(x).mean`) and normalizes in training (`normalize_dit_input`).
`mla-convert encode` stores normalized latents, and says so in a shard's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError

Latents = Literal["auto", "normalized", "raw"]

KIND_NOTE, SCALE_NOTE = "mla_convert.latents", "mla_convert.latents_scale"

# Expected deviation of a small data set's statistics from those of all videos. For the logarithms of the standard
# deviations: the offset that all channels share (contrast), and each channel's own; then the means, in stds.
_SHARED_SPREAD, _SPREAD, _MEAN_SPREAD = 0.5, 0.35, 0.5
EVIDENCE = 3.0
"""The log-likelihood ratio (20 to 1) above which latents count as raw, or below its negative as normalized."""


class Scale(NamedTuple):
    """The mean and standard deviation of each of C channels over all videos."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def standardize(self, latents: Tensor) -> Tensor:
        """`(latents - mean) / std` for latents `[C, F, H, W]`, float32."""
        mean, std = (torch.tensor(part).view(-1, 1, 1, 1) for part in self)
        return (latents - mean) / std


# fmt: off
# The defaults of diffusers' AutoencoderKLWan, the VAE of every Wan2.1 model.
WAN21 = Scale(
    (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
     0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
     3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916),
)
# Those of Wan2.2-TI2V-5B (Wan-Video/Wan2.2, wan/modules/vae2_2.py).
WAN22 = Scale(
    (-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
     0.157, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
     -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123, -0.0313, -0.1649, 0.0117, 0.0723,
     -0.2839, -0.2083, -0.052, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
    (0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
     0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
     0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
     0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)
# fmt: on
BY_CHANNELS = {len(scale.mean): scale for scale in (WAN21, WAN22)}


def notes_of(raw: Scale | None) -> dict[str, str]:
    """A shard's metadata about its latents. Pass the VAE's statistics as `raw` for raw latents; None is normalized."""
    return {KIND_NOTE: "normalized"} if raw is None else {KIND_NOTE: "raw", SCALE_NOTE: json.dumps(raw._asdict())}


def scale_of(notes: Mapping[str, str], channels: int, where: str) -> Scale:
    """The statistics that normalize raw latents with `channels` channels: from the shard's notes, or of Wan's VAEs.

    Raises UserError, with the shard's name `where`, if the statistics are unknown.
    """
    if SCALE_NOTE in notes:
        noted = json.loads(notes[SCALE_NOTE])
        return Scale(tuple(noted["mean"]), tuple(noted["std"]))
    if channels not in BY_CHANNELS:
        known = " and ".join(map(str, BY_CHANNELS))
        raise UserError(
            f"data.latents: raw: the latents in {where} have {channels} channels and no statistics in the metadata "
            f"(only Wan's VAEs, with {known} channels, are known); normalize them, or encode the videos again"
        )
    return BY_CHANNELS[channels]


def evidence_of_raw(clips: Iterable[Tensor], scale: Scale) -> float:
    """The log-likelihood ratio of raw to normalized latents for clips `[C, F, H, W]`; positive favors raw.

    A small data set has its own statistics, and high contrast alone is no evidence. The ratio therefore uses the
    pattern over channels: their standard deviations without a common factor, and their means in standard deviations.
    It is 0 without clips, or if a channel is constant.
    """
    first = second = torch.zeros(len(scale.mean), dtype=torch.float64)
    count = 0
    for clip in clips:
        values = clip.double().flatten(1)
        first, second, count = first + values.sum(1), second + values.square().sum(1), count + values.shape[1]
    mean = first / max(count, 1)
    std = (second / max(count, 1) - mean.square()).clamp_min(0).sqrt()
    if float(std.min()) < 1e-6:
        return 0.0
    center, spread = (torch.tensor(part, dtype=torch.float64) for part in scale)
    normalized = _misfit(mean / std, std.log())
    return (normalized - _misfit(mean / std - center / spread, std.log() - spread.log())) / 2


def _misfit(means: Tensor, logs: Tensor) -> float:
    """The squared Mahalanobis distance from 0 of `means` `[C]` and of `logs` `[C]`, which share a random offset."""
    share = _SHARED_SPREAD**2 / (_SPREAD**2 + len(logs) * _SHARED_SPREAD**2)
    distance = (logs.square().sum() - share * logs.sum().square()) / _SPREAD**2
    return float(distance + means.square().sum() / _MEAN_SPREAD**2)


def vae_statistics(vae: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The mean and standard deviation of a VAE's latents by channel, `[1, C, 1, 1, 1]` each, on its device."""
    mean, std = (
        torch.tensor(vae.config[key], device=vae.device, dtype=dtype).view(1, -1, 1, 1, 1)
        for key in ("latents_mean", "latents_std")
    )
    return mean, std


def normalized(vae: Any, latents: Tensor) -> Tensor:
    """Raw latents `[B, C, F, H, W]` of `vae`, float32 on its device, as a transformer takes them."""
    mean, std = vae_statistics(vae, torch.float32)
    return (latents - mean) * (1.0 / std)
