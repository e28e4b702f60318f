"""Train the natural-video teacher: `python -m mla_convert.zoo.natural.train`.

Training is teacher forcing (arXiv 2412.07772, 2506.08009) as for the digits teacher, on crops of real videos. Three
prompts in ten are dropped, because held-out video has none. A stopped run resumes from `--out`.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from ...distill.objective import flow_loss, teacher_forcing_loss
from ...families.wan import CausalWanTransformer3DModel
from ..training import CONTEXT_NOISE, Options, architecture, train
from .clips import CHANNELS, SHIFT, TEXT_DIM, sample_batch, shots

NULL_PROMPT_RATE = 0.3
EVALUATED_CLIPS = 32
EVALUATION_SEED = 1
DEFAULTS = Options(out=Path("runs/natural-teacher"), steps=600, batch=2, copies=3, eval_every=150, average=0.98)


def split_loss(model: CausalWanTransformer3DModel, split: str) -> float:
    """The teacher-forcing loss on fixed clips of a split, crops that training never drew, with fixed noise."""
    latents, text = sample_batch(shots(split), EVALUATED_CLIPS, EVALUATION_SEED)
    with torch.autocast("cpu", torch.bfloat16):
        return flow_loss(model, {"latents": latents, "encoder_hidden_states": text}, batch_size=8)


def main() -> None:
    options = DEFAULTS.from_command_line(__doc__)
    torch.manual_seed(options.seed)
    train(
        CausalWanTransformer3DModel(**architecture(CHANNELS, TEXT_DIM)),
        options,
        clips=lambda step: sample_batch(shots("train"), options.batch, options.seed, step * options.batch),
        objective=functools.partial(teacher_forcing_loss, shift=SHIFT, context_noise=CONTEXT_NOISE),
        evaluate=lambda model, _: {f"{split}_clips_loss": split_loss(model, split) for split in ("train", "heldout")},
        null_prompts=NULL_PROMPT_RATE,
    )


if __name__ == "__main__":
    main()
