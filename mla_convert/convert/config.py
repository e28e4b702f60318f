"""The `convert` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..flow import noise_levels
from ..mla.config import CACHE_KEY, OwnChunk, Position, check_shared_latent
from ..sampling import DenoisingSteps, Seed
from .factorize import RIDGE

Init = Literal["random", "svd", "activation"]
Rank = Annotated[int, Field(ge=1)]


class CalibrationConfig(BaseModel):
    """How much data the activation statistics come from.

    - `clips` videos are run through the dense model at random noise levels, which `timestep_shift` warps as in the
      stages. With `denoising_steps`, out of 1000 and before the shift, only these levels are used: a few-step model
      knows no others.
    - `queries_per_chunk` is the maximum number of queries per chunk that measure how an error in a cached token changes
      the output of the layer. With m of n queries, `metric: velocity` underrates what any two of them have in common,
      by (m - 1) / (n - 1). `max_tokens` is the maximum number of tokens per layer that are measured.
    - `context_noise` is the noise level of the history in the clips: the one at which `generate` caches chunks.
    - `empty_prompt_rate` is the share of clips that get the negative prompt in place of their own, for models that are
      sampled with guidance.
    - `probes` is the number of random projections whose moments are averaged for each token's gradient. More probes
      make the metric of the fit less random. Each costs one backward pass of every block, one layer's hidden states on
      disk, and a gradient of every sampled key and value in memory.
    - `ridge` is added to the whole metric, as a share of its mean eigenvalue, so that directions which few tokens and
      probes have tested still count.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    source: Literal["data", "rollouts"] = "data"
    metric: Literal["output", "velocity"] = "velocity"
    hidden_states: Literal["teacher", "converted"] = "teacher"
    clips: int = Field(64, ge=1)
    batch_size: int = Field(16, ge=1)
    queries_per_chunk: int = Field(512, ge=1)
    max_tokens: int = Field(16384, ge=1)
    probes: int = Field(1, ge=1)
    ridge: float = Field(RIDGE, gt=0)
    empty_prompt_rate: float = Field(0.0, ge=0, le=1)
    timestep_shift: float = Field(1.0, gt=0)
    denoising_steps: DenoisingSteps | None = None
    context_noise: float = Field(0.0, ge=0, le=1)
    seed: Seed = 0

    @property
    def noise_levels(self) -> tuple[float, ...] | None:
        """The noise levels in (0, 1] of the `denoising_steps`; None without them, when every level may be drawn."""
        return noise_levels(self.denoising_steps, self.timestep_shift)

    @model_validator(mode="after")
    def _converted_goes_forward(self) -> CalibrationConfig:
        if self.hidden_states == "converted" and self.metric == "velocity":
            raise ValueError(
                "hidden_states converted fits layers from the first to the last, metric velocity from the last to the "
                "first; set metric to output"
            )
        return self


class Budget(BaseModel):
    """How much a cache may hold or cost, for ranks that differ from layer to layer.

    Set exactly one of `scalars_per_token` (mean over layers, including a cached shared key), `reduction` (share of the
    dense cache that is removed, 0.927 in VideoMLA) and `loss_increase` (predicted rise of the flow-matching loss before
    training, 0.01 for 1 %; an estimate, often low beyond a few percent). Ranks are multiples of `rank_multiple`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    scalars_per_token: float | None = Field(None, gt=0)
    reduction: float | None = Field(None, gt=0, lt=1)
    loss_increase: float | None = Field(None, gt=0)
    rank_multiple: int = Field(16, ge=1)

    @model_validator(mode="after")
    def _one_aim(self) -> Budget:
        aims = ("scalars_per_token", "reduction", "loss_increase")
        given = [name for name in aims if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"budget needs one of {', '.join(aims)}, got {', '.join(given) or 'none'}")
        return self

    def scalars(self, dense: int) -> float | None:
        """The budget in cached scalars per token, of the dense model's `dense`; None for a `loss_increase`."""
        return self.scalars_per_token if self.reduction is None else (1 - self.reduction) * dense


class ConvertConfig(BaseModel):
    """What the converted attention looks like and how it is initialized.

    - `position`, `own_chunk`: see `mla_convert.mla.config.MLAConfig`.
    - `layers_per_latent` consecutive layers share one latent, which is cached once.
    - `kv_lora_rank` is the width of a latent: one number, or one per latent. The default is 192 for each layer of the
      latent. It is null with a `budget`, which chooses the ranks. A latent of 448 for two layers takes as much cache as
      224 for each.
    - `qk_rope_head_dim` is the number of channels of the shared rotary key (even); `rotate_on_read` has none.
    - `q_lora_rank: null` keeps full-rank queries. A number factorizes them; an `activation` fit takes the queries of
      clean and of noisy tokens.
    - `init: random` draws the latent projections. `svd` factorizes the weights and shares the mean key over the heads
      (VideoMLA, arXiv 2605.30351, section 3.2). `activation` fits the output of the attention on calibration data.
    - `key_mean` and `keep_residual` are for an `activation` fit with a shared rotary key. With `key_mean`, the mean key
      of every head, a constant that need not be cached, is rotated in full. With `keep_residual`, the unrotated
      channels restore what the shared key does not capture of its pairs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    position: Position = "rotate_on_read"
    own_chunk: OwnChunk = "exact"
    init: Init = "activation"
    kv_lora_rank: Rank | list[Rank] | None = None
    layers_per_latent: int = Field(1, ge=1)
    budget: Budget | None = None
    qk_rope_head_dim: int = Field(0, ge=0)
    q_lora_rank: int | None = Field(None, ge=1)
    keep_residual: bool = True
    key_mean: bool = True
    calibration: CalibrationConfig = CalibrationConfig()

    @model_validator(mode="before")
    @classmethod
    def _default_rank(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("budget") is None and "kv_lora_rank" not in value:
            layers = value.get("layers_per_latent", 1)
            return {**value, "kv_lora_rank": 192 * (layers if isinstance(layers, int) else 1)}
        return value

    @model_validator(mode="after")
    def _shared_key_fits_the_layout(self) -> ConvertConfig:
        if (self.kv_lora_rank is None) == (self.budget is None):
            raise ValueError("give kv_lora_rank or budget, one of the two")
        if self.budget is not None and (self.init != "activation" or self.calibration.metric != "velocity"):
            raise ValueError("budget measures layers; set init to activation and calibration.metric to velocity")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even (channel pairs are rotated), got {self.qk_rope_head_dim}")
        if self.position == "rotate_on_read" and self.qk_rope_head_dim:
            raise ValueError("position rotate_on_read has no shared rotary key; leave qk_rope_head_dim at 0")
        if self.position != "rotate_on_read" and not self.qk_rope_head_dim:
            raise ValueError(
                f"position {self.position} needs a shared rotary key; set qk_rope_head_dim, 32 in VideoMLA"
            )
        return self

    @model_validator(mode="after")
    def _latents_that_can_be_shared(self) -> ConvertConfig:
        check_shared_latent(self.layers_per_latent, self.position, self.own_chunk)
        if self.layers_per_latent > 1 and self.init == "svd":
            raise ValueError(
                "layers_per_latent above 1 needs to see what layers have in common on data; set init to activation"
            )
        if self.layers_per_latent > 1 and self.init == "activation" and self.calibration.metric != "velocity":
            raise ValueError(
                "layers_per_latent above 1 weighs layers against each other; set calibration.metric to velocity"
            )
        return self

    @property
    def cached_key(self) -> int:
        """How many scalars of a cache row are the shared rotary key."""
        return self.qk_rope_head_dim if self.position in CACHE_KEY else 0

    @property
    def keeps_key_mean(self) -> bool:
        """Whether the mean key is stored separately from what the latent restores."""
        return self.key_mean and self.init == "activation" and self.position != "rotate_on_read"

    def ranks(self, num_layers: int) -> list[int]:
        """The `kv_lora_rank` of every layer. Raises ValueError if it is null or a list of the wrong length."""
        if self.kv_lora_rank is None:
            raise ValueError("the budget chooses it layer by layer")
        if isinstance(self.kv_lora_rank, int):
            return [self.kv_lora_rank] * num_layers
        latents, what = num_layers // self.layers_per_latent, "layers" if self.layers_per_latent == 1 else "latents"
        if len(self.kv_lora_rank) != latents:
            raise ValueError(f"kv_lora_rank lists {len(self.kv_lora_rank)} {what}, the model has {latents}")
        return self.for_layers(self.kv_lora_rank)

    def for_layers(self, by_latent: list[int]) -> list[int]:
        """Repeat the rank of each latent for all layers that share it."""
        return [rank for rank in by_latent for _ in range(self.layers_per_latent)]
