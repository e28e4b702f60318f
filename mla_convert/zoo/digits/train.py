"""Train the digits teacher: `python -m mla_convert.zoo.digits.train --steps 1800`.

Teacher forcing (arXiv 2412.07772, 2506.08009): one clean copy of each clip provides the history,
several noisy copies with an independent noise level a chunk are denoised against it, all in one
block-causal forward with a sliding window and a sink. Half of the clean copies carry a little
noise of their own, so that the model learns to repair the history that it will have made itself.
Noise levels lean to the noisy end, where the class and the place of the digit are decided.
The script resumes from `--out` where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...distill.data import DigitClips
from ...distill.objective import flow_loss, teacher_forcing_loss
from ...evaluate.config import EvaluateConfig
from ...evaluate.rollouts import digit_rollouts
from ...families.wan import CausalWanTransformer3DModel
from ...files import write_json
from .data import CLIP_FRAMES, GUIDANCE, SHIFT, TEXT_DIM, sample_batch

CAUSAL = {"num_frames_per_block": 3, "window_frames": 10, "sink_frames": 1, "independent_first_frame": True}
MODEL = {
    "patch_size": (1, 4, 4),
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 1,
    "text_dim": TEXT_DIM,
    "freq_dim": 64,
    "ffn_dim": 512,
    "num_layers": 4,
}
NULL_PROMPT_RATE = 0.1
CONTEXT_NOISE = 0.3


def heldout_loss(model: CausalWanTransformer3DModel) -> float:
    """Teacher-forcing loss on digits and prompts that were never trained on, fixed noise."""
    with torch.autocast("cpu", torch.bfloat16):
        return flow_loss(model, DigitClips(seed=0).heldout())


def rollout_accuracy(
    model: CausalWanTransformer3DModel, num_frames: int, rollouts: int = 216, guidance_scale: float = GUIDANCE
) -> float:
    """Share of rollouts of held-out prompts whose class the classifier reads in the last frame."""
    config = EvaluateConfig(rollout_prompts=rollouts, shift=SHIFT, guidance_scale=guidance_scale)
    _, right = digit_rollouts(model, num_frames, config)
    return right[:, -1].float().mean().item()


def save_teacher(model: Any, folder: Path) -> None:
    """Write a stock `WanTransformer3DModel` folder whose configuration also says how it streams (`causal`)."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    write_json(folder / "config.json", {**config, "_class_name": "WanTransformer3DModel"})
    (folder / "diffusion_pytorch_model.safetensors").chmod(0o644)


def make_optimizers(model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("blocks.")]
    known = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100, decay: float = 0.4) -> float:
    """Linear warm-up, constant, then linear decay to zero over the last `decay` share of the steps."""
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/digits-teacher"))
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--copies", type=int, default=3)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-every", type=int, default=200)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = CausalWanTransformer3DModel(**MODEL, causal=CAUSAL)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.996))
    optimizers = make_optimizers(model, args.lr)
    first, seconds = 0, 0.0
    state_file = args.out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, seconds = state["step"], state["seconds"]
    args.out.mkdir(parents=True, exist_ok=True)
    log = (args.out / "metrics.jsonl").open("a")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, from step {first}", flush=True)

    started, losses = time.monotonic() - seconds, []
    for step in range(first, args.steps):
        batch = sample_batch(args.batch, CLIP_FRAMES, np.random.default_rng((args.seed, step)))
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        dropped = torch.rand(args.batch, generator=generator) < NULL_PROMPT_RATE
        text = batch.embeddings * ~dropped[:, None, None]
        # The backward of the CPU's fused attention is slower than plain matmuls at this size.
        with sdpa_kernel(SDPBackend.MATH):
            with torch.autocast("cpu", torch.bfloat16):
                loss = teacher_forcing_loss(
                    model, batch.videos, text, generator, copies=args.copies, shift=SHIFT, context_noise=CONTEXT_NOISE
                )
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.lr)
            optimizer.step()
            optimizer.zero_grad()
        average.update_parameters(model)
        losses.append(loss.item())
        done = step + 1
        if done % 50 == 0:
            spent = time.monotonic() - started
            print(f"{done} {spent:.0f}s loss {np.mean(losses[-50:]):.4f} grad {norm:.3f}", flush=True)
        if done % args.eval_every == 0 or done == args.steps:
            ema: Any = average.module.eval()
            row = {
                "step": done,
                "seconds": round(time.monotonic() - started, 1),
                "train_loss": float(np.mean(losses[-args.eval_every :])),
                "heldout_loss": heldout_loss(ema),
                "accuracy": rollout_accuracy(ema, CLIP_FRAMES),
            }
            if done == args.steps:
                row["accuracy_8x"] = rollout_accuracy(ema, 8 * CLIP_FRAMES, rollouts=72)
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(row, flush=True)
            save_teacher(ema, args.out / "transformer")
            state = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": done,
                "seconds": time.monotonic() - started,
            }
            torch.save(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)


if __name__ == "__main__":
    main()
