"""Runs the model of a generation, in one process or in all processes of a launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..devices import default_device
from ..distill.progress import leave_to_the_first
from ..families.causal import CausalTransformer
from ..mla.conditions import FramesAt
from ..mla.kernels import Kernels
from ..run.config import GenerateConfig
from ..run.image import ImageLatents
from ..run.launch import Launch
from ..run.offload import place
from ..run.prompts import PromptSchedule
from ..run.sample import rollout
from ..run.source_video import SourceVideo
from ..run.stream import PromptAt
from ..run.streaming import StreamingConfig
from .execution import Execution


@dataclass(frozen=True)
class Job:
    """What a process needs to run the model of `folder`: the arguments of `rollout` that can be sent to it, and more.

    `video` says that the source is a video, which the first process of a launch reads for all. `conditions` are tensors
    or `ImageLatents`.
    """

    folder: Path
    execution: Execution
    streaming: StreamingConfig
    config: GenerateConfig
    embeds: Tensor
    start: Tensor | None
    source: Tensor | None
    video: bool
    conditions: dict[str, Any] | None
    negative: Tensor | None
    endless: bool

    def models(self, vae: Any, device: torch.device) -> tuple[list[CausalTransformer], list[Kernels]]:
        """The model, or its experts, on `device` with the `vae`; and what their kernels choose."""
        models = self.execution.load(self.folder)
        if Launch.current is not None:
            for model in models:
                model.set_parallel(Launch.current.group)
        chosen = self.streaming.apply(*models)
        place(models, vae, device, self.execution.offload)
        return models, chosen

    def chunks(
        self,
        models: Sequence[CausalTransformer],
        device: torch.device,
        schedule: PromptSchedule | None = None,
        video: SourceVideo | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Tensor]:
        """The rollout; in a launch of several processes with the `schedule` and the `video` of the first one."""
        config, count, launch = self.config, len(self.embeds), Launch.current
        prompt_at: PromptAt | None = schedule
        source: Tensor | FramesAt | None = video if self.video else self.source
        if launch is not None:
            prompt_at = launch.prompt_at(schedule)
            source = launch.led(video) if self.video else source
        chunks = rollout(
            models,
            self.embeds,
            config,
            progress,
            start=self.start,
            source=source,
            conditions=self.conditions,
            endless=self.endless,
            seed=config.seed if count == 1 else [config.seed + index for index in range(count)],
            negative_hidden_states=self.negative,
            prompt_at=prompt_at,
            device=device,
        )
        return chunks if launch is None else launch.chunks(chunks)


def follow(launch: Launch) -> int:
    """Run the model in a process of a launch that does not lead; returns the exit code of the one that does."""

    def work() -> None:
        leave_to_the_first()
        job: Job = launch.hear(Job, Execution, StreamingConfig, GenerateConfig, ImageLatents, type(Path()))
        device = default_device()
        models, _ = job.models(None, device)
        for _ in job.chunks(models, device):
            pass

    return launch.follow(work)
