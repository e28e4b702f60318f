"""Measures how far a converted model is from its teacher: loss, velocity, attention, memory and rollouts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..distill.data import Data, DigitClips
from ..distill.objective import noised_batches, predict_velocity
from ..distill.progress import Report
from ..families.causal import CausalTransformer, LatentTransformer
from ..mla.attention import AttentionPass
from .attention_maps import AttentionMaps
from .beside import Beside
from .config import EvaluateConfig
from .digits_bench import digits_bench
from .worst_clips import ClipErrors, heldout_prompts

TIME_BINS = 10


class _AttentionError:
    """Accumulates the student's self-attention error by layer, on the teacher's inputs."""

    def __init__(self, student: LatentTransformer, teacher: CausalTransformer) -> None:
        layers = len(teacher.blocks)
        self.student = student
        # Sums stay on the device until the end: reading one would wait for it in every layer.
        self.error: list[Any] = [0.0] * layers
        self.energy: list[Any] = [0.0] * layers
        self.beside = Beside(student, teacher, self._compare)

    def _compare(
        self, layer: int, hidden_states: Tensor, step: AttentionPass, out: Tensor, student_step: AttentionPass
    ) -> None:
        attention = self.student.blocks[layer].attn1
        dtype = next(attention.parameters()).dtype
        other = attention(hidden_states.to(dtype), None, None, student_step).float()
        self.error[layer] = self.error[layer] + (other - out.float()).square().sum().double()
        self.energy[layer] = self.energy[layer] + out.float().square().sum().double()

    def close(self) -> list[float]:
        self.beside.close()
        return [(float(e) / max(float(n), 1e-30)) ** 0.5 for e, n in zip(self.error, self.energy, strict=True)]


@torch.no_grad()
def fidelity(
    student: LatentTransformer,
    teacher: CausalTransformer,
    clips: Mapping[str, Tensor],
    batch_size: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    prompts: Sequence[str] | None = None,
    levels: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Measure losses and relative errors on `clips` with clean history and one noise level per chunk.

    Both models get the same inputs, at all noise levels or only at `levels`. `teacher_loss` and `student_loss` are
    mean squared errors of the velocity against the data; `loss_increase` is their ratio minus 1. A relative error is
    the RMS of the student's difference from the teacher divided by the RMS of the teacher: `velocity_rel_error`,
    `velocity_rel_error_by_timestep` in ten bins of noise level (`[middle of the bin, error]`), and
    `attention_rel_error` of each layer's self-attention output on the teacher's inputs. `attention_maps` is the
    result of `AttentionMaps`, `by_clip` that of `ClipErrors` with the `prompts` of the clips.
    """
    squared = {"teacher": 0.0, "student": 0.0}
    count = 0
    error, energy = torch.zeros(TIME_BINS, dtype=torch.float64), torch.zeros(TIME_BINS, dtype=torch.float64)
    attention, maps = _AttentionError(student, teacher), AttentionMaps(student, teacher)
    by_clip = ClipErrors()
    batches = math.ceil(len(clips["latents"]) / batch_size)
    for done, noised in enumerate(noised_batches(teacher, clips, batch_size, seed, levels)):
        inputs = noised.to(teacher.device)
        expected = predict_velocity(teacher, inputs)
        actual = predict_velocity(student, inputs)
        squared["teacher"] += float((expected - inputs.target).double().square().sum())
        squared["student"] += float((actual - inputs.target).double().square().sum())
        count += expected.numel()
        bins = (inputs.t * TIME_BINS).long().clamp_max(TIME_BINS - 1).cpu()
        error.index_put_((bins,), (actual - expected).double().square().sum((1, 3, 4)).cpu(), accumulate=True)
        energy.index_put_((bins,), expected.double().square().sum((1, 3, 4)).cpu(), accumulate=True)
        by_clip.add(inputs, expected, actual)
        if progress is not None:
            progress(done + 1, batches)
    by_time = [
        [(index + 0.5) / TIME_BINS, float((e / n).sqrt())]
        for index, (e, n) in enumerate(zip(error, energy, strict=True))
        if n > 0
    ]
    return {
        "teacher_loss": squared["teacher"] / count,
        "student_loss": squared["student"] / count,
        "loss_increase": squared["student"] / squared["teacher"] - 1,
        "velocity_rel_error": float((error.sum() / energy.sum()).sqrt()),
        "velocity_rel_error_by_timestep": by_time,
        "attention_rel_error": attention.close(),
        "attention_maps": maps.close(),
        "by_clip": by_clip.result(prompts or [""] * len(clips["latents"])),
    }


def evaluate(
    student: LatentTransformer, teacher: CausalTransformer, data: Data, config: EvaluateConfig, report: Report
) -> dict[str, Any]:
    """Measure everything that the report shows about a converted model and its dense teacher.

    Returns the keys of `fidelity` and `memory`, and `clips`, how many were measured. For digits it adds
    `digits_bench`; `kernels`, which attention ran in the rollouts of each model; and `accuracy`, the share of
    rollouts whose last frame shows the prompted class, by model and length.
    """
    clips = data.heldout(config.clips)
    prompts = heldout_prompts(data, clips["encoder_hidden_states"])
    progress = functools.partial(report, "evaluate")
    result = fidelity(student, teacher, clips, config.batch_size, config.seed, progress, prompts, config.noise_levels)
    result["clips"] = len(clips["latents"])
    result |= memory(student, teacher, *clips["latents"].shape[-2:])
    if isinstance(data, DigitClips) and config.rollout_prompts:
        models = {"teacher": teacher, "student": student}
        result["digits_bench"], result["accuracy"] = digits_bench(models, config, report)
        result["kernels"] = {name: model.kernels.report() for name, model in models.items() if model.kernels}
    return result


def memory(student: LatentTransformer, teacher: CausalTransformer, height: int, width: int) -> dict[str, Any]:
    """The cache sizes of one stream of latents of `height x width`, as allocated, and the `layout`.

    Keys: `dense_scalars_per_token`, `latent_scalars_per_token`, `reduction`, `dense_cache_bytes`,
    `latent_cache_bytes` and `layout`.
    """
    dense, latent = (model.init_cache(1, height, width, device="meta") for model in (teacher, student))
    layers = range(len(student.mla.kv_lora_rank))
    return {
        "dense_scalars_per_token": dense.scalars_per_token(),
        "latent_scalars_per_token": latent.scalars_per_token(),
        "reduction": 1 - latent.scalars_per_token() / dense.scalars_per_token(),
        "dense_cache_bytes": dense.bytes(),
        "latent_cache_bytes": latent.bytes(),
        "layout": {
            "position": student.mla.position,
            "own_chunk": student.mla.own_chunk,
            "kv_lora_rank": list(student.mla.kv_lora_rank),
            "layers_per_latent": student.mla.layers_per_latent,
            "qk_rope_head_dim": [student.mla.qk_rope_head_dim(layer) for layer in layers],
            "q_lora_rank": student.mla.q_lora_rank,
        },
    }
