"""Train the digits teacher: `python -m mla_convert.zoo.digits.train --steps 1800`.

Training is teacher forcing (arXiv 2412.07772, 2506.08009): one clean copy of each clip provides the history, and
several noisy copies, with an independent noise level per chunk, are denoised against it. All of this is one
block-causal forward pass with a sliding window and a sink. Half of the clean copies get a little noise, so that the
model learns to repair the imperfect history that it generates in a rollout. Noise levels are shifted toward the noisy
end, where the class and the place of the digit are decided. A stopped run resumes from `--out`.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...distill.data import DigitClips
from ...distill.objective import flow_loss, teacher_forcing_loss
from ...evaluate.config import EvaluateConfig
from ...evaluate.rollouts import digit_rollouts
from ...families.wan import CausalWanTransformer3DModel
from ..training import CONTEXT_NOISE, Options, architecture, train
from .data import CLIP_FRAMES, GUIDANCE, SHIFT, TEXT_DIM, sample_batch

NULL_PROMPT_RATE = 0.1
DEFAULTS = Options(out=Path("runs/digits-teacher"), steps=1800, batch=8, copies=3, eval_every=200)


def heldout_loss(model: CausalWanTransformer3DModel) -> float:
    """The teacher-forcing loss on held-out digits and prompts, with fixed noise."""
    with torch.autocast("cpu", torch.bfloat16):
        return flow_loss(model, DigitClips(seed=0).heldout())


def rollout_accuracy(
    model: CausalWanTransformer3DModel, num_frames: int, rollouts: int = 216, guidance_scale: float = GUIDANCE
) -> float:
    """The share of rollouts of held-out prompts whose last frame the classifier recognizes."""
    config = EvaluateConfig(rollout_prompts=rollouts, shift=SHIFT, guidance_scale=guidance_scale)
    _, right = digit_rollouts(model, num_frames, config)
    return right[:, -1].float().mean().item()


def evaluate(model: CausalWanTransformer3DModel, last: bool) -> dict[str, float]:
    """Measure the values of one line of `metrics.jsonl`."""
    row = {"heldout_loss": heldout_loss(model), "accuracy": rollout_accuracy(model, CLIP_FRAMES)}
    if last:
        row["accuracy_8x"] = rollout_accuracy(model, 8 * CLIP_FRAMES, rollouts=72)
    return row


def main() -> None:
    options = DEFAULTS.from_command_line(__doc__)
    torch.manual_seed(options.seed)

    def clips(step: int) -> tuple[Tensor, Tensor]:
        batch = sample_batch(options.batch, CLIP_FRAMES, np.random.default_rng((options.seed, step)))
        return batch.videos, batch.embeddings

    train(
        CausalWanTransformer3DModel(**architecture(channels=1, text_dim=TEXT_DIM)),
        options,
        clips=clips,
        objective=functools.partial(teacher_forcing_loss, shift=SHIFT, context_noise=CONTEXT_NOISE),
        evaluate=evaluate,
        null_prompts=NULL_PROMPT_RATE,
    )


if __name__ == "__main__":
    main()
