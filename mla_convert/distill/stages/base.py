"""What a stage is: a name, its configuration, the networks it needs, and its losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..data import Batch, Data

AVERAGE, START = "average", "start"

Models = Mapping[str, Any]


class StageConfig(BaseModel):
    """The keys that every stage has; a stage adds its own.

    `steps` counts optimizer steps, `batch_size` clips a process and micro-step. The learning rate
    rises linearly over `warmup_steps` and then follows `schedule`. With `ema_decay` the stage
    ends with the averaged weights. `max_grad_norm` null clips nothing. `trainable` is `latent` (the
    projections that conversion added), `attention` (all of the self-attention) or `all`.
    `eval_every` null measures the held-out loss only before the first and after the last step;
    `checkpoint_every` null writes a checkpoint only at the end.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    # Whether a step may leave some of the trained parameters without a gradient.
    partial_gradients: ClassVar[bool] = False

    stage: str
    steps: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float | None = Field(1.0, gt=0)
    batch_size: int = Field(8, ge=1)
    grad_accumulation: int = Field(1, ge=1)
    ema_decay: float | None = Field(None, gt=0, lt=1)
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    trainable: Literal["latent", "attention", "all"] = "latent"
    checkpoint_every: int | None = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    eval_every: int | None = Field(500, ge=1)
    data_workers: int = Field(0, ge=0)
    tracker: Literal["tensorboard"] | None = "tensorboard"


@dataclass(frozen=True)
class SecondNetwork:
    """A network that a stage trains beside the student, in float32: a copy of the network `source`.

    It gets `updates` optimizer steps of its own AdamW before each of the student's, over
    `trainable` of its parameters. Its rate `learning_rate` follows the stage's warm-up and schedule.
    """

    name: str
    source: str
    updates: int
    trainable: Literal["attention", "all"]
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float = 0.0


Config = TypeVar("Config", bound=StageConfig)


class Stage(ABC, Generic[Config]):
    """One way of training the student; a module exports a subclass as STAGE.

    `networks` names the frozen networks that the losses find in `models` beside `student`. The trainer
    places them, in evaluation mode and without gradients. Two of them it makes itself from the student:
    `average` has the averaged weights of `ema_decay`, `start` the weights that the stage began with.
    A stage with a `second` network finds that in `models` too.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[StageConfig]]

    def __init__(self, config: Config) -> None:
        self.config = config

    @property
    @abstractmethod
    def networks(self) -> tuple[str, ...]: ...

    @property
    def second(self) -> SecondNetwork | None:
        """The network that is trained beside the student, if there is one."""
        return None

    def check(self, student: Any, networks: Models, data: Data) -> None:
        """Raise UserError, in one line, for what `loss` cannot work on; called before anything is written."""

    def begin_update(self, generator: torch.Generator) -> None:
        """Make the choices of the next optimizer step that its micro-batches and all processes share.

        Every process calls it before every step of either network with a CPU generator in the same state.
        """

    @abstractmethod
    def loss(self, models: Models, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss with gradient, and scalars to log.

        Runs under the trainer's autocast. Every random draw comes from `generator`, a CPU generator
        of this micro-batch's own.
        """

    def second_loss(self, models: Models, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the `second` network, on the terms of `loss`."""
        raise NotImplementedError(f"stage {self.name} trains no second network")
