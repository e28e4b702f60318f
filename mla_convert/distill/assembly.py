"""Prepares the networks of a stage: trained, frozen and averaged ones. At the end it restores plain weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..draws import Use, drawn
from .adapters import ADAPTER, adapted_modules, add_adapters, merge_adapters, save_adapters
from .average import Average
from .learner import Learner, OptimizerSettings
from .runtime import StageModule, autocast, splits_optimizer
from .sharding import frozen_shards, gather, is_sharded, shards_weights, trainable_shards
from .stages.base import AVERAGE, START, SecondNetwork, Stage, StageConfig
from .trainable import freeze_all_but, trainable_names
from .views import apart, start_of, trainable_copy, with_weights
from .zero import ZeroLearner


class Assembly:
    """The learners of a stage and its average.

    `learner` trains the student in place, in float32. A sharded student is trained as a copy: `student`
    stays a plain model and receives the result. `second` trains the stage's second network.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        stage: Stage[Any],
        student: Any,
        networks: Mapping[str, Any],
        seed: int,
        stage_index: int,
    ) -> None:
        self.accelerator, self.config, self.student = accelerator, stage.config, student
        config: StageConfig = stage.config
        student.float().train()
        names = trainable_names(student, config.trainable)
        if config.lora is not None:
            modules = adapted_modules(student, config.lora, names, config.adapted_part)
            names |= add_adapters(student, config.lora, modules, drawn(Use.ADAPTERS, seed, stage_index))
        trained = freeze_all_but(student, names)
        second, sharded = stage.second, shards_weights(accelerator)
        in_shards = (sharded or config.shard_frozen) and accelerator.num_processes > 1
        others = {name: self._frozen(networks[name], in_shards) for name in stage.networks if name in networks}
        self._precision = functools.partial(autocast, accelerator.device, config.mixed_precision, sharded)
        network = apart(student) if sharded else student
        module = StageModule("student", network, others, self._precision)
        learner = ZeroLearner if splits_optimizer(accelerator) else Learner
        self.learner = learner(accelerator, module, trained, _settings(accelerator, config))
        self.second = None if second is None else self._second(second, networks[second.source], others)
        if self.second is not None:
            module.others[self.second.name] = self.second.network
        if START in stage.networks:
            module.others[START] = self._in_shards(student) if sharded else start_of(student, trained)
        self.average = None
        if config.ema_decay is not None:
            self.average = Average(self.learner.trained, config.ema_decay, config.ema_warmup)
            if AVERAGE in stage.networks:
                if sharded:
                    self.average.replica = self._in_shards(student)
                module.others[AVERAGE] = self.average.replica or with_weights(student, self.average.weights)
        self.under_training = [module.network, *([] if self.second is None else [self.second.network])]
        self.frozen = [network for network in module.others.values() if network not in self.under_training]

    def _frozen(self, network: Any, in_shards: bool) -> Any:
        """A frozen `network` on this process's device, or sharded over all processes."""
        network.eval().requires_grad_(False)
        if not in_shards:
            return network.to(self.accelerator.device)
        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        return frozen_shards(network, mesh)

    def _second(self, second: SecondNetwork, source: Any, others: Mapping[str, nn.Module]) -> Learner:
        """The learner of the stage's second network: a copy of `source`, sharded if the student is."""
        if shards_weights(self.accelerator):
            network = trainable_shards(source, self._mesh)
        else:
            network = trainable_copy(source).to(self.accelerator.device)
        trained = freeze_all_but(network, trainable_names(network, second.trainable))
        config = self.config
        settings = OptimizerSettings(
            config.optimizer,
            second.learning_rate,
            second.betas,
            config.epsilon,
            second.weight_decay,
            _fuses(self.accelerator, config),
        )
        module = StageModule(second.name, network, others, self._precision)
        return Learner(self.accelerator, module, trained, settings)

    def _in_shards(self, network: Any) -> Any:
        """A frozen copy of the student's `network` as it is now, sharded as the student is."""
        return frozen_shards(network, self._mesh)

    @property
    def _mesh(self) -> DeviceMesh:
        """The mesh of processes over which the student is sharded."""
        trained: Any = next(iter(self.learner.trained.values()))
        return trained.device_mesh

    @property
    def sharded(self) -> bool:
        return is_sharded(self.learner.module)

    def finish(self, work_dir: Path) -> None:
        """Leave `student` as a plain model in evaluation mode, with the averaged weights if there is an average.

        Adapters are saved to `work_dir` and merged.
        """
        if self.average is not None:
            self.average.copy_to_trained()
        self.learner.finish()
        if self.sharded:
            gather(self.learner.weights(), self.student)
        if self.config.lora is not None:
            if self.accelerator.is_main_process:
                save_adapters(self.student, work_dir / ADAPTER)
            merge_adapters(self.student)
        self.student.eval()


def _settings(accelerator: Accelerator, config: StageConfig) -> OptimizerSettings:
    fused = _fuses(accelerator, config)
    return OptimizerSettings(
        config.optimizer, config.learning_rate, config.betas, config.epsilon, config.weight_decay, fused
    )


def _fuses(accelerator: Accelerator, config: StageConfig) -> bool:
    """Whether to use fused AdamW: on a GPU, unless a loss scaler or DeepSpeed takes the step."""
    on_gpu = accelerator.device.type == "cuda"
    return on_gpu and config.mixed_precision != "fp16" and not splits_optimizer(accelerator)
