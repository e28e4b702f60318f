"""Sections of a stage's keys: adapters, the stopping rule, what counts as a spike, previews."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ..sampling import SamplingConfig, Seed

Tracker = Literal["tensorboard", "wandb", "trackio"]


class LoraConfig(BaseModel):
    """Low-rank adapters (LoRA, arXiv 2106.09685) on linear layers of the blocks that `trainable` leaves frozen.

    Each adds `alpha / rank * B A` to a weight; `A` `[rank, in]` starts random and `B` `[out, rank]` zero.
    `target_modules` are ends of module names, such as `attn2.to_q` or `ffn.net.2`; null means all of those layers. At
    the end of the stage the adapters are merged into the weights.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    rank: int = Field(ge=1)
    alpha: int = Field(ge=1)
    target_modules: tuple[str, ...] | None = None


class StopConfig(BaseModel):
    """End before `steps` when the held-out loss no longer falls.

    An evaluation counts as progress when its held-out loss is below `1 - min_delta` times the best one so far. The
    stage ends after `patience` evaluations in a row without progress.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    patience: int = Field(ge=1)
    min_delta: float = Field(0.0, ge=0, lt=1)


class SpikeConfig(BaseModel):
    """A loss above `factor` times the median of the last `window` losses is a spike, once there are that many.

    `action: warn` logs it, `skip` leaves out the optimizer step, `stop` ends the run as diverged.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    factor: float = Field(10.0, gt=1)
    window: int = Field(50, ge=2)
    action: Literal["warn", "skip", "stop"] = "warn"


class PreviewConfig(SamplingConfig):
    """Every `every` steps, a rollout for the prompts of the first `clips` held-out clips.

    It has `num_frames` latent frames (null: as many as a clip). The sampling keys are those of `generate`: set the
    `sampler` and the `denoising_steps` that the stage trains its student for. The strip, one row per clip, goes to the
    tracker and to `previews/` in the stage's folder.
    """

    every: int = Field(ge=1)
    clips: int = Field(4, ge=1)
    num_frames: int | None = Field(None, ge=1)
    num_inference_steps: int = Field(4, ge=1)
    seed: Seed = 0
