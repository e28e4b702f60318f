"""Estimates what a stage needs from shapes alone: parameters, bytes per GPU by cause, clips and tokens.

N is the number of student parameters, T the number of them trained, b the parameters of the largest block, W the
number of processes, and e the bytes per number in the forward (2 under autocast, else 4). Primes mark the second
network. n is W if the student is sharded (FSDP2) and else 1; under ZeRO-2, n is W only for gradients and optimizer.
The bytes are

    parameters      4 N / n                     float32; a sharded student gathers two blocks: + 8 b
    gradients       4 T / n                     DDP's buckets hold the gradients; ZeRO-2's two buckets: + 8 `BUCKET`
    optimizer       8 T / n                     AdamW's two moments, or Adafactor's rows and columns; ZeRO-2's
                                                own weights: + 4 T / W
    average         4 T / n                     if the stage runs the average of a sharded student: + 4 N / n
    second network  (4 N' + 12 T') / n          weights, gradients and moments of a stage's second network;
                                                sharded: + 8 b'
    frozen networks their parameters in their dtype / n; / W with `shard_frozen`, which gathers two blocks at a time;
                    `start` 4 T (4 N / n beside a sharded student)
    held-out teacher the teacher's parameters in their dtype, if the stage uses none: the first process measures it
                    before the first step, where gradients exist, but not yet what is listed as optimizer, casts,
                    activations and caches; counted is what exceeds these
    casts           2 (T + T')                  autocast's copies of the weights; under FSDP2 of one block only
    activations     tokens A                    stored by autograd for a micro-batch, see below
    caches          4 row S_w                   of a rollout in training, for a window of S_w tokens
    vae             what a stage that re-encodes takes for that, weights included, in every process; given

Take a block of width d and feed-forward width f, whose chunks see h history tokens per token of their own. It stores
`d (54 + (12 + 2 h) e) + 2 f e` bytes per token. Latent attention of rank r adds at most `d (4 + h) e + r e`, and
text attention that also reads an image's tokens adds `d e`. With `gradient_checkpointing`, every block stores only
its input, `d e`, and one block at a time stores everything. For L layers that share a latent, one chunk of C is
recomputed at a time; they store the input of the first layer and the latents that each chunk
reads, `d e + r e C / 2`. `match_attention` stores the input, output and gradient of every layer,
`3 d e`. `tests/test_dry_run.py` compares this with what autograd stored for real blocks.

On disk, a stage has `keep_checkpoints` checkpoints and the one that it is writing, each with the 12 T bytes of weights
and moments, the average and the second network's 12 T', and at its end the student and the second network in float32.

In host memory, a process holds 4 N of a sharded student, and whole copies of frozen networks that are sharded; beside
a sharded student, the first process also loads the held-out teacher.

Not counted: memory that is freed within a layer, kernel workspaces, fragmentation, and the clips themselves; the
images of a clip of 81 frames of 480x832 pixels add another 10 MB. `RESERVED_BYTES` is meant to cover these. Of host
memory, what lasts a moment: 4 T while a plain checkpoint is written, for the weights and then for their average, and
the moments of all learners, in every process, while one is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from ..sizes import RESERVED_BYTES
from .adapters import adapted_modules
from .runtime import BUCKET
from .stages.base import AVERAGE, START, TEACHER, Stage, StageConfig
from .trainable import trainable_names


@dataclass(frozen=True)
class Launch:
    """How a stage is launched: its processes, and whether they shard the student (FSDP2) or its optimizer (ZeRO-2)."""

    processes: int = 1
    sharded: bool = False
    zero: bool = False


@dataclass(frozen=True)
class ClipShape:
    """The shape of a training clip: latents `[channels, frames, height, width]`, text `[text_tokens, text_dim]`."""

    channels: int
    frames: int
    height: int
    width: int
    text_tokens: int
    text_dim: int


class Footprint(BaseModel):
    """What one stage needs. `memory` has bytes per GPU by cause; `memory_bytes` is their sum plus `RESERVED_BYTES`.

    `host_bytes` are the bytes of host memory of the first process, which needs the most. `disk` has the most bytes on
    disk by cause, for all processes together; `disk_bytes` is their sum.

    `clips` and `tokens` count what the student is trained on over all steps and processes.
    """

    model_config = ConfigDict(frozen=True)

    stage: str
    steps: int
    clips: int
    tokens: int
    parameters: int
    trained: int
    memory: dict[str, int]
    memory_bytes: int
    host_bytes: int
    disk: dict[str, int]
    disk_bytes: int


def footprint(
    stage: Stage[Any], student: Any, networks: Mapping[str, Any], launch: Launch, clip: ClipShape, vae: int = 0
) -> Footprint:
    """Estimate the needs of `stage`. All models may be on the meta device; `student` counts as float32.

    `vae` is what re-encoding takes, in bytes.
    """
    config: StageConfig = stage.config
    trained, adapters = _trained(student, config)
    rows, columns = student.token_grid(clip.height, clip.width)
    tokens = clip.frames * rows * columns
    parts = launch.processes if launch.sharded else 1
    split = launch.processes if launch.zero else parts
    weights = count(student) + adapters
    block = max(count(block) for block in student.blocks)
    shapes = [parameter.shape for name, parameter in student.named_parameters() if name in trained]
    trained_weights = sum(shape.numel() for shape in shapes) + adapters
    second = sum(shape.numel() for shape in _second_shapes(stage, networks))
    memory = {
        "parameters": 4 * weights // parts + (8 * block if launch.sharded else 0),
        "gradients": 4 * trained_weights // split + (8 * BUCKET if launch.zero else 0),
        "optimizer": (_optimizer_bytes(config, shapes, adapters) + (4 * trained_weights if launch.zero else 0))
        // split,
        "average": _average_bytes(config, stage, weights, trained_weights, launch),
        "second_network": _second_bytes(stage, networks, config, launch),
        "frozen_networks": _frozen_bytes(stage, networks, weights, trained_weights, launch),
        "casts": 0 if config.mixed_precision == "no" else 2 * (block if launch.sharded else trained_weights + second),
        "activations": activation_bytes(stage, student, clip.frames, rows * columns),
        "caches": _cache_bytes(config, student, clip.frames, rows * columns),
        "vae": vae,
    }
    disk = _disk(stage, networks, weights - adapters, shapes, adapters)
    memory["heldout_teacher"] = _heldout_teacher_bytes(stage, networks, memory)
    clips = config.steps * config.batch_size * config.grad_accumulation * launch.processes
    return Footprint(
        stage=config.stage,
        steps=config.steps,
        clips=clips,
        tokens=clips * tokens,
        parameters=weights,
        trained=trained_weights,
        memory=memory,
        memory_bytes=sum(memory.values()) + RESERVED_BYTES,
        host_bytes=_host_bytes(stage, networks, weights, launch),
        disk=disk,
        disk_bytes=sum(disk.values()),
    )


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def block_bytes(student: Any, tokens_of_history: float, e: int) -> float:
    """The bytes that autograd stores per token of one block; see the module docstring."""
    config = student.config
    d = config.num_attention_heads * config.attention_head_dim
    kept = d * (54 + (12 + 2 * tokens_of_history) * e) + 2 * config.ffn_dim * e
    if getattr(config, "added_kv_proj_dim", None) is not None:
        kept += d * e
    mla = getattr(student, "mla", None)
    if mla is not None:
        kept += d * (4 + tokens_of_history) * e + max(mla.kv_lora_rank) * e
    return float(kept)


def activation_bytes(stage: Stage[Any], student: Any, frames: int, tokens_per_frame: int) -> int:
    """The bytes that autograd stores for one micro-batch."""
    config: StageConfig = stage.config
    e = 4 if config.mixed_precision == "no" else 2
    seen = config.frames_with_graph(frames)
    chunks = student.causal.chunks(seen)
    history = sum(len(student.causal.history(start, stop)) for start, stop in chunks) / seen
    tokens = config.batch_size * config.sequences_a_clip * seen * tokens_per_frame
    d = student.config.num_attention_heads * student.config.attention_head_dim
    block, layers = block_bytes(student, history, e), len(student.blocks)
    if stage.calls_parts:
        return int(tokens * (block + 3 * d * e * layers))
    if config.gradient_checkpointing:
        shared = max(map(len, student.latent_groups))
        if shared == 1:
            return int(tokens * (d * e * layers + block))
        read = max(student.mla.kv_lora_rank) * e * len(chunks) / 2
        return int(tokens * ((d * e + read) * layers / shared + block * shared / len(chunks)))
    return int(tokens * block * layers)


def _trained(student: Any, config: StageConfig) -> tuple[set[str], int]:
    """The names of the parameters that are trained in full, and the number of adapter weights."""
    names = trainable_names(student, config.trainable)
    if config.lora is None:
        return names, 0
    layers = [student.get_submodule(name) for name in adapted_modules(student, config.lora, names, config.adapted_part)]
    return names, sum(config.lora.rank * (layer.in_features + layer.out_features) for layer in layers)


def _optimizer_bytes(config: StageConfig, shapes: list[torch.Size], adapters: int) -> int:
    if config.optimizer == "adamw":
        return 8 * (sum(shape.numel() for shape in shapes) + adapters)

    def state(shape: torch.Size) -> int:
        """Adafactor stores means of a matrix's rows and columns, and the full state of smaller parameters."""
        return shape.numel() if len(shape) < 2 else shape.numel() // shape[-1] + shape.numel() // shape[-2]

    return 4 * adapters + 4 * sum(map(state, shapes))


def _average_bytes(config: StageConfig, stage: Stage[Any], weights: int, trained: int, launch: Launch) -> int:
    if config.ema_decay is None:
        return 0
    if not launch.sharded:
        return 4 * trained
    return 4 * (trained + (weights if AVERAGE in stage.networks else 0)) // launch.processes


def _second_shapes(stage: Stage[Any], networks: Mapping[str, Any]) -> list[torch.Size]:
    """The shapes of the trained parameters of a stage's second network."""
    second = stage.second
    if second is None:
        return []
    network = networks[second.source]
    names = trainable_names(network, second.trainable)
    return [parameter.shape for name, parameter in network.named_parameters() if name in names]


def _second_bytes(stage: Stage[Any], networks: Mapping[str, Any], config: StageConfig, launch: Launch) -> int:
    if stage.second is None:
        return 0
    network, shapes = networks[stage.second.source], _second_shapes(stage, networks)
    gradients = 4 * sum(shape.numel() for shape in shapes)
    held = 4 * count(network) + gradients + _optimizer_bytes(config, shapes, 0)
    return held // launch.processes + 8 * max(map(count, network.blocks)) if launch.sharded else held


def _disk(
    stage: Stage[Any], networks: Mapping[str, Any], weights: int, shapes: list[torch.Size], adapters: int
) -> dict[str, int]:
    """The bytes on disk by cause; `shapes` and `adapters` are trained."""
    config: StageConfig = stage.config
    trained = 4 * (sum(shape.numel() for shape in shapes) + adapters)
    checkpoint = trained + _optimizer_bytes(config, shapes, adapters) + (0 if config.ema_decay is None else trained)
    second = 0
    if stage.second is not None:
        of_second = _second_shapes(stage, networks)
        checkpoint += 4 * sum(shape.numel() for shape in of_second) + _optimizer_bytes(config, of_second, 0)
        second = 4 * count(networks[stage.second.source])
    return {"checkpoints": (config.keep_checkpoints + 1) * checkpoint, "student": 4 * weights, "second_network": second}


def _unused_teacher(stage: Stage[Any], networks: Mapping[str, Any]) -> int:
    """The bytes of a teacher that the stage does not use, and of which the first process measures the held-out loss."""
    return 0 if TEACHER in stage.needed or TEACHER not in networks else _bytes(networks[TEACHER])


def _heldout_teacher_bytes(stage: Stage[Any], networks: Mapping[str, Any], memory: Mapping[str, int]) -> int:
    """What the held-out teacher takes beyond the `memory` that only the first step occupies."""
    later = sum(memory[cause] for cause in ("optimizer", "casts", "activations", "caches"))
    return max(0, _unused_teacher(stage, networks) - later)


def _host_bytes(stage: Stage[Any], networks: Mapping[str, Any], weights: int, launch: Launch) -> int:
    in_shards = launch.sharded or (stage.config.shard_frozen and launch.processes > 1)
    frozen = sum(_bytes(networks[name]) for name in stage.frozen)
    # Networks are built on the host before they are sharded; the second one is gathered there when the stage ends.
    second = 0 if stage.second is None else 4 * count(networks[stage.second.source])
    student = 4 * weights + _unused_teacher(stage, networks) if launch.sharded else 0
    return student + (frozen if in_shards else 0) + second


def _frozen_bytes(stage: Stage[Any], networks: Mapping[str, Any], weights: int, trained: int, launch: Launch) -> int:
    named = [networks[name] for name in stage.frozen]
    held, gathered = sum(map(_bytes, named)), 0
    start = 4 * (weights if launch.sharded else trained) if START in stage.networks else 0
    if launch.sharded:
        return (held + start) // launch.processes
    if stage.config.shard_frozen and launch.processes > 1:
        held, gathered = held // launch.processes, max(2 * _bytes(block) for each in named for block in each.blocks)
    return held + gathered + start


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _cache_bytes(config: StageConfig, student: Any, frames: int, tokens_per_frame: int) -> int:
    """The cache of a stage that rolls out; with gradient checkpointing, also a copy for each chunk with a graph."""
    if not config.rolls_out:
        return 0
    window = student.causal.window_frames or frames
    cache = 4 * config.batch_size * sum(student.row_widths) * window * tokens_per_frame
    chunks = len(student.causal.chunks(config.frames_with_graph(frames)))
    return int(cache * (1 + chunks if config.gradient_checkpointing else 1))
