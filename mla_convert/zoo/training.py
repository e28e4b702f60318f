"""Train the embedded teachers: their architecture, optimizers, schedule, and a training loop that resumes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..files import atomic_folder, write_json
from ..flow import drop_prompts

CAUSAL = {"num_frames_per_block": 3, "window_frames": 10, "sink_frames": 1, "independent_first_frame": True}
CONTEXT_NOISE = 0.3
PRINT_EVERY = 50


def architecture(channels: int, text_dim: int) -> dict[str, Any]:
    """The arguments of a `CausalWanTransformer3DModel` of 2.3 M parameters for pixels of `channels` colors."""
    return {
        "patch_size": (1, 4, 4),
        "num_attention_heads": 6,
        "attention_head_dim": 32,
        "in_channels": channels,
        "out_channels": channels,
        "text_dim": text_dim,
        "freq_dim": 64,
        "ffn_dim": 512,
        "num_layers": 4,
        "causal": CAUSAL,
    }


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line of a training script and its defaults; `average` is the decay of the weights' moving average."""

    out: Path
    steps: int
    batch: int
    copies: int
    eval_every: int
    average: float = 0.996
    lr: float = 2e-3
    seed: int = 0

    def from_command_line(self, description: str | None) -> Options:
        """Parse `sys.argv`, with the values of this instance as defaults."""
        parser = argparse.ArgumentParser(description=description)
        for name, default in dataclasses.asdict(self).items():
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
        return Options(**vars(parser.parse_args()))


def save_teacher(model: Any, folder: Path) -> None:
    """Write a stock `WanTransformer3DModel` folder whose configuration also has the streaming settings, `causal`."""
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        config = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        write_json(temporary / "config.json", {**config, "_class_name": "WanTransformer3DModel"})
        (temporary / "diffusion_pytorch_model.safetensors").chmod(0o644)


def make_optimizers(model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks and AdamW for all other parameters."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("blocks.")]
    matrix_ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in matrix_ids]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100, decay: float = 0.4) -> float:
    """The rate at a step: linear warm-up, constant, linear decay to zero over the last `decay` of the steps."""
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


def train(
    model: Any,
    options: Options,
    clips: Callable[[int], tuple[Tensor, Tensor]],
    objective: Callable[..., Tensor],
    evaluate: Callable[[Any, bool], dict[str, float]],
    null_prompts: float,
) -> None:
    """Train `model` into the folder `options.out`; resumes where an earlier call was stopped.

    `clips(step)` returns videos `[B, C, F, H, W]` and embeddings `[B, L, D]`; a share `null_prompts` of the embeddings
    is zeroed. `objective(model, videos, text, generator, copies=...)` is the loss. Every `options.eval_every` steps,
    `evaluate(average, last)` measures the moving average of the weights and its values become a line of
    `metrics.jsonl`. The average is saved in `transformer/`.
    """
    moving_average = torch.optim.swa_utils.get_ema_multi_avg_fn(options.average)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=moving_average)
    optimizers = make_optimizers(model, options.lr)
    first, seconds = 0, 0.0
    state_file = options.out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, seconds = state["step"], state["seconds"]
    options.out.mkdir(parents=True, exist_ok=True)
    log = (options.out / "metrics.jsonl").open("a", encoding="utf-8")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, from step {first}", flush=True)

    started, losses = time.monotonic() - seconds, []
    for step in range(first, options.steps):
        videos, text = clips(step)
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        text = drop_prompts(text, null_prompts, generator)
        # The backward of the CPU's fused attention is slower than plain matmuls at this size.
        with sdpa_kernel(SDPBackend.MATH):
            with torch.autocast("cpu", torch.bfloat16):
                loss = objective(model, videos, text, generator, copies=options.copies)
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, options.steps, options.lr)
            optimizer.step()
            optimizer.zero_grad()
        average.update_parameters(model)
        losses.append(loss.item())
        done = step + 1
        if done % PRINT_EVERY == 0:
            spent = time.monotonic() - started
            print(f"{done} {spent:.0f}s loss {np.mean(losses[-PRINT_EVERY:]):.4f} grad {norm:.3f}", flush=True)
        if done % options.eval_every == 0 or done == options.steps:
            row = {
                "step": done,
                "seconds": round(time.monotonic() - started, 1),
                "train_loss": float(np.mean(losses[-options.eval_every :])),
                **evaluate(average.module.eval(), done == options.steps),
            }
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(row, flush=True)
            save_teacher(average.module, options.out / "transformer")
            state = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": done,
                "seconds": time.monotonic() - started,
            }
            torch.save(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
