"""Prepares the networks of a stage: trained, frozen and averaged ones. At the end it restores plain weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from ..draws import Use, drawn
from .adapters import ADAPTER, adapted_modules, add_adapters, merge_adapters, save_adapters
from .average import Average
from .learner import Learner, OptimizerSettings
from .runtime import StageModule, autocast, splits_optimizer
from .sharded import ShardedLearner
from .sharding import frozen_shards, read_whole, shards_weights, write_whole
from .stages.base import AVERAGE, START, SecondNetwork, Stage, StageConfig
from .state import SECOND, STUDENT
from .trainable import freeze_all_but, trainable_names
from .zero import ZeroLearner


class Assembly:
    """The networks of a stage: `learner` trains the student in float32, `second` the second network if there is one.

    The student is trained in place, or as a copy whose result `finish` puts there. A second network that `continues`
    begins with the weights in `second_start`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        stage: Stage[Any],
        student: Any,
        networks: Mapping[str, Any],
        seed: int,
        stage_index: int,
        second_start: Path | None = None,
    ) -> None:
        self.accelerator, self.config, self.student = accelerator, stage.config, student
        config: StageConfig = stage.config
        student.float().train()
        names = trainable_names(student, config.trainable)
        if config.lora is not None:
            modules = adapted_modules(student, config.lora, names, config.adapted_part)
            names |= add_adapters(student, config.lora, modules, drawn(Use.ADAPTERS, seed, stage_index))
        trained = freeze_all_but(student, names)
        sharded = shards_weights(accelerator)
        in_shards = (sharded or config.shard_frozen) and accelerator.num_processes > 1
        others = {name: self._frozen(networks[name], in_shards) for name in stage.frozen}
        self._precision = functools.partial(autocast, accelerator.device, config.mixed_precision, sharded)
        kind = ShardedLearner if sharded else ZeroLearner if splits_optimizer(accelerator) else Learner
        module = StageModule("student", kind.network_of(student), others, self._precision)
        settings = _settings(accelerator, config)
        self.learner = kind(accelerator, module, trained, settings, STUDENT)
        self.second = None
        if stage.second is not None:
            network = self.learner.copy_to_train(networks[stage.second.source])
            if stage.second.continues:
                assert second_start is not None
                read_whole(second_start, network)
            self.second, self.second_file = self._second(stage.second, network, others, settings), stage.second.file
            module.others[self.second.name] = self.second.network
        if START in stage.networks:
            module.others[START] = self.learner.start_of(student)
        if config.ema_decay is not None:
            self.learner.average = Average(self.learner.trained, config.ema_decay, config.ema_warmup)
            if AVERAGE in stage.networks:
                module.others[AVERAGE] = self.learner.average_of(student)
        self.learners = [self.learner, *([] if self.second is None else [self.second])]
        self.under_training = [learner.network for learner in self.learners]
        self.frozen = [network for network in module.others.values() if network not in self.under_training]

    def _frozen(self, network: Any, in_shards: bool) -> Any:
        """A frozen `network` on this process's device, or sharded over all processes."""
        network.eval().requires_grad_(False)
        if not in_shards:
            return network.to(self.accelerator.device)
        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        return frozen_shards(network, mesh)

    def _second(
        self, second: SecondNetwork, network: Any, others: Mapping[str, nn.Module], settings: OptimizerSettings
    ) -> Learner:
        """The learner of the stage's second `network`, of the kind and with the `settings` of the student's."""
        trained = freeze_all_but(network, trainable_names(network, second.trainable))
        own = dataclasses.replace(
            settings, learning_rate=second.learning_rate, betas=second.betas, weight_decay=second.weight_decay
        )
        module = StageModule(second.name, network, others, self._precision)
        return type(self.learner)(self.accelerator, module, trained, own, SECOND)

    def finish(self, work_dir: Path) -> None:
        """Leave `student` as a plain model in evaluation mode, with the averaged weights if there is an average.

        Adapters are saved to `work_dir` and merged. The second network goes to its file there.
        """
        if self.second is not None:
            write_whole(work_dir / self.second_file, self.second.network, self.accelerator.is_main_process)
        self.learner.finish(self.student)
        if self.config.lora is not None:
            if self.accelerator.is_main_process:
                save_adapters(self.student, work_dir / ADAPTER)
            merge_adapters(self.student)
        self.student.eval()


def _settings(accelerator: Accelerator, config: StageConfig) -> OptimizerSettings:
    """The settings of the student's optimizer; AdamW is fused on a GPU, unless a loss scaler or DeepSpeed steps."""
    on_gpu = accelerator.device.type == "cuda"
    fused = on_gpu and config.mixed_precision != "fp16" and not splits_optimizer(accelerator)
    return OptimizerSettings(
        config.optimizer, config.learning_rate, config.betas, config.epsilon, config.weight_decay, fused
    )
