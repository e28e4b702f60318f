"""Defines a stage: its name, its configuration, the networks that it needs, and its losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ...errors import UserError
from ..data import Batch, Data
from ..keys import LoraConfig, PreviewConfig, SpikeConfig, StopConfig, Tracker
from ..trainable import Trainable

AVERAGE, START, TEACHER, REAL_SCORE = "average", "start", "teacher", "real_score"

Models = Mapping[str, Any]

ImageLatent = Callable[[Tensor], Tensor]
"""The latent `[B, C, 1, H, W]` of the last video frame of latents `[B, C, F, H, W]`, encoded as an image."""

Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = tuple[Beta, Beta]
"""AdamW's decay rates of the first and second moments."""


class StageConfig(BaseModel):
    """The keys that every stage has; a stage adds its own.

    **How long.** `steps` counts optimizer steps; `stop` may end the stage earlier. `batch_size` is clips per process
    and micro-step, `grad_accumulation` is micro-steps per step. `global_batch` is the number of clips per step over all
    processes; `grad_accumulation` then follows from it. More processes then make a stage faster without changing what
    it learns.

    **What is trained.** `trainable` is `latent` (the projections that conversion added), `attention` (all of the
    self-attention) or `all`. `lora` adds adapters to linear layers of the rest.

    **Optimizer.** `adamw`, in float32, with `betas` in [0, 1), `epsilon` and decoupled `weight_decay` on everything
    that is trained, or `adafactor`, whose state is about a thousandth of that. Adafactor's learning rate is relative: a
    step moves a tensor by about that share of the root mean square of its weights, so it has to be far larger than
    AdamW's. The learning rate rises linearly over `warmup_steps` and then follows `schedule`, which falls to
    `min_learning_rate` at `steps`. With `max_grad_norm: null`, nothing is clipped. With `ema_decay`, the stage ends
    with the averaged weights. `ema_warmup` lets the decay rise to that value, `(1 + n) / (10 + n)` after n steps, so
    that a short stage forgets its start.

    **How it is computed.** `mixed_precision` is autocast over float32 weights; fp16 needs a GPU.
    `gradient_checkpointing` recomputes blocks in the backward pass instead of storing their activations. `shard_frozen`
    shards the networks that a stage does not train over the processes, as FSDP2 always does. `compile` compiles each
    block with `torch.compile` and `compile_backend`.

    **What is watched.** `spike` defines which losses are outliers and what happens then; null disables it. `eval_every:
    null` measures the held-out loss only before the first and after the last step. A checkpoint is written every
    `checkpoint_every` steps (null for none), `checkpoint_minutes` after the previous one (null for none), when a signal
    asks the stage to stop, and at the end. `tracker` is one tracker or several, or null for none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    # Whether a step may leave some of the trained parameters without a gradient.
    partial_gradients: ClassVar[bool] = False
    # The stage's loss can train only adapters inside modules with this name.
    adapted_part: ClassVar[str] = "blocks"

    stage: str
    steps: int = Field(ge=1)
    stop: StopConfig | None = None
    learning_rate: float = Field(gt=0)
    min_learning_rate: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    weight_decay: float = Field(0.0, ge=0)
    betas: Betas = (0.9, 0.999)
    epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float | None = Field(1.0, gt=0)
    batch_size: int = Field(8, ge=1)
    grad_accumulation: int = Field(1, ge=1)
    global_batch: int | None = Field(None, ge=1)
    ema_decay: float | None = Field(None, gt=0, lt=1)
    ema_warmup: bool = True
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    shard_frozen: bool = False
    compile: bool = False
    compile_backend: str = "inductor"
    trainable: Trainable = "latent"
    lora: LoraConfig | None = None
    spike: SpikeConfig | None = SpikeConfig()
    checkpoint_every: int | None = Field(500, ge=1)
    checkpoint_minutes: float | None = Field(30.0, gt=0)
    keep_checkpoints: int = Field(2, ge=1)
    eval_every: int | None = Field(500, ge=1)
    preview: PreviewConfig | None = None
    data_workers: int = Field(0, ge=0)
    tracker: Tracker | tuple[Tracker, ...] | None = "tensorboard"

    @property
    def sequences_a_clip(self) -> int:
        """Sequences of a clip's length that pass through the student with a graph, per clip of a batch."""
        return 1

    @property
    def reads_negative(self) -> bool:
        """Whether the losses need the negative prompt."""
        return False

    @property
    def needs_negative(self) -> bool:
        """Whether the losses or the preview need the negative prompt."""
        return self.reads_negative or (self.preview is not None and self.preview.guidance_scale != 1)

    @property
    def reencodes(self) -> bool:
        """Whether the losses need an `ImageLatent`."""
        return False

    @property
    def noise_levels(self) -> tuple[float, ...] | None:
        """The noise levels in (0, 1] to which training and the held-out loss are restricted; None for all."""
        return None

    @property
    def rolls_out(self) -> bool:
        """Whether the student generates its own training clips, with a cache."""
        return False

    def frames_with_graph(self, frames: int) -> int:
        """Latent frames per sequence that passes through the student with a graph, for clips of `frames`."""
        return frames

    def over(self, processes: int) -> StageConfig:
        """This configuration with the `grad_accumulation` that `global_batch` implies for that many processes.

        Raises UserError if `batch_size * processes` does not divide `global_batch`.
        """
        if self.global_batch is None:
            return self
        micro_steps, rest = divmod(self.global_batch, self.batch_size * processes)
        if rest or not micro_steps:
            raise UserError(
                f"stage {self.stage}: global_batch {self.global_batch} is not a multiple of batch_size "
                f"{self.batch_size} times {processes} processes; change it or the number of processes"
            )
        return self.model_copy(update={"grad_accumulation": micro_steps})

    @model_validator(mode="after")
    def _keys_fit_each_other(self) -> StageConfig:
        if self.lora is not None and self.trainable == "all":
            raise ValueError("lora adapts only frozen layers, and trainable: all freezes none; leave lora out")
        if self.stop is not None and self.eval_every is None:
            raise ValueError("stop needs a held-out loss every few steps; set eval_every")
        if self.global_batch is not None and self.grad_accumulation != 1:
            raise ValueError("grad_accumulation follows from global_batch; leave one of them out")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError("min_learning_rate is above learning_rate; lower it")
        return self


@dataclass(frozen=True)
class SecondNetwork:
    """A copy of the network `source` that a stage trains beside the student, in float32.

    The source need not be one of the stage's `networks`. The copy has its own optimizer, which takes `updates` steps
    before each student step and trains the `trainable` part of its parameters. Its `learning_rate` follows the
    stage's warm-up and schedule. With `continues`, it begins with the weights that one of this name ended with in the
    last stage that trained one; its key in the configuration, of that name too, is then `previous`.
    """

    name: str
    source: str
    updates: int
    trainable: Literal["attention", "all"]
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float = 0.0
    continues: bool = False

    @property
    def file(self) -> str:
        """The file, in the stage's training folder, that it ends in: all of its weights, float32."""
        return f"{self.name}.safetensors"


Config = TypeVar("Config", bound=StageConfig)


class Stage(ABC, Generic[Config]):
    """One way of training the student; a module exports a subclass as STAGE.

    `networks` names the frozen networks that the losses find in `models` beside `student`. The trainer
    places them on the device, in evaluation mode and without gradients. It derives two of them from the student:
    `average` has the averaged weights of `ema_decay`, `start` the weights that the stage began with.
    If a stage has a `second` network, `models` holds it too. `negative` `[L, D]` is the negative prompt of the
    data. The trainer sets it if the configuration `needs_negative`; None means zeros. It sets `image_latent` if the
    configuration `reencodes`.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[StageConfig]]
    # Whether the loss calls parts of the student's blocks directly, which sharded blocks do not allow.
    calls_parts: ClassVar[bool] = False
    negative: Tensor | None = None
    image_latent: ImageLatent | None = None

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    @abstractmethod
    def networks(self) -> tuple[str, ...]: ...

    @property
    def frozen(self) -> tuple[str, ...]:
        """Those of `networks` that a run loads; the trainer derives the others from the student."""
        return tuple(name for name in self.networks if name not in (AVERAGE, START))

    @property
    def needed(self) -> tuple[str, ...]:
        """What a run has to load: the `frozen` networks, and the source of the second one."""
        sources = () if self.second is None else (self.second.source,)
        return tuple(dict.fromkeys((*self.frozen, *sources)))

    @property
    def second(self) -> SecondNetwork | None:
        """The network that the stage trains beside the student, if any."""
        return None

    def check(self, student: Any, networks: Models, data: Data) -> None:
        """Raise UserError, in one line, if `loss` cannot work on these inputs; called before anything is written.

        Decide by configurations and shapes alone: when a run starts, the models are on the meta device, and clips that
        it still has to generate are noise.
        """

    def begin_update(self, generator: torch.Generator) -> None:
        """Draw what all micro-batches and processes share in the next optimizer step.

        Every process calls this before every step of either network, with a CPU generator in the same state.
        """

    @abstractmethod
    def loss(self, models: Models, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss, with gradient, and scalars to log.

        Runs under the trainer's autocast. Take every random draw from `generator`, a CPU generator
        that belongs to this micro-batch.
        """

    def second_batch(self, models: Models, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch for `second_loss`: what the student makes of a micro-batch, without gradients.

        It is a separate call because a sharded student's weights are gathered only in a call of its own module.
        """
        return batch

    def second_loss(self, models: Models, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the `second` network on a `second_batch`, as `loss` does; `models` has no student."""
        raise NotImplementedError(f"stage {self.name} trains no second network")
