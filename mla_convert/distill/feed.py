"""Feeds a stage: a process's micro-batches of every optimizer step, each with its own generator."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from ..devices import processes_here
from ..draws import Use, drawn
from .data import Batch, Data, without_worker_traceback
from .order import DataOrder, MicroBatches
from .requests import leave_signals_to_parent
from .stages.base import StageConfig

SHARED_MEMORY = Path("/dev/shm")
"""Where Linux has the memory through which data workers hand over batches."""
BATCHES_AHEAD = 2
"""Batches that a data worker reads ahead."""

logger = logging.getLogger(__name__)


class MicroBatch(NamedTuple):
    """Clips on the device, and the CPU generator of everything that is drawn for them."""

    clips: Batch
    generator: torch.Generator


class Update(NamedTuple):
    """One optimizer step: the generator that all processes share, and this process's micro-batches, read when due."""

    shared: torch.Generator
    batches: Iterator[MicroBatch]


def feed(
    accelerator: Accelerator,
    config: StageConfig,
    data: Data,
    seed: int,
    stage_index: int,
    updates_a_step: int,
    first: int,
) -> Iterator[Update]:
    """Yield the optimizer steps of a stage from step `first` onward, `updates_a_step` for each of its steps.

    The micro-batches of one must be consumed before the next one is requested.
    """
    clips = _clips(accelerator, config, data, DataOrder(data.size, seed, stage_index), updates_a_step, first)
    processes, rank = accelerator.num_processes, accelerator.process_index

    def micro_batches(update: int) -> Iterator[MicroBatch]:
        for micro in range(update * config.grad_accumulation, (update + 1) * config.grad_accumulation):
            yield MicroBatch(next(clips), drawn(Use.NOISE, seed, stage_index, micro * processes + rank))

    for update in range(first * updates_a_step, config.steps * updates_a_step):
        yield Update(drawn(Use.SHARED, seed, stage_index, update), micro_batches(update))


def _clips(
    accelerator: Accelerator, config: StageConfig, data: Data, order: DataOrder, updates_a_step: int, first: int
) -> Iterator[Batch]:
    """This process's batches of clips from step `first` onward, on its device."""
    sampler = MicroBatches(
        order,
        config.batch_size,
        config.grad_accumulation * updates_a_step,
        accelerator.num_processes,
        accelerator.process_index,
        first,
        config.steps,
    )
    workers = data_workers(config, data)
    loader = DataLoader(
        _Examples(data),
        batch_sampler=sampler,
        num_workers=workers,
        prefetch_factor=BATCHES_AHEAD if workers else None,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),
        worker_init_fn=leave_signals_to_parent,
    )
    for batch in without_worker_traceback(loader):
        yield {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}


def data_workers(config: StageConfig, data: Data) -> int:
    """The recipe's `data_workers`, or none if what they read ahead would not fit the machine's shared memory.

    A worker that finds it full fails, and the stage with it. A container has 64 MB unless it is given more.
    """
    if config.data_workers == 0 or not SHARED_MEMORY.is_dir():
        return config.data_workers
    clip = sum(tensor.nbytes for tensor in data.example(0).values())
    needed = clip * config.batch_size * BATCHES_AHEAD * config.data_workers * processes_here()
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed <= free:
        return config.data_workers
    logger.warning(
        f"stage {config.stage}: data_workers need {needed / 1e6:.0f} MB of shared memory, and {SHARED_MEMORY} has "
        f"{free / 1e6:.0f} MB free, so clips are read between the steps; give a container more (docker run --shm-size)"
    )
    return 0


class _Examples(Dataset[Batch]):
    def __init__(self, data: Data) -> None:
        self.data = data

    def __getitem__(self, index: int) -> Batch:
        return self.data.example(index)
