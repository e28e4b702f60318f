"""Digits restyled at every strength: `python docs/benchmarks/restyle.py`.

Held-out videos of real digits are restyled by the embedded digits teacher, each for a prompt of another digit, place
and direction. Measured for every strength: how many frames show the prompted digit and how many that of the source, by
the classifier of the package, and how far the ink's center lies from that of the source. Writes `restyle.json` and
`restyle.md` beside this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla_convert.evaluate.digits_bench import real_videos
from mla_convert.evaluate.rollouts import chosen_prompts
from mla_convert.files import write_json, write_text
from mla_convert.load import load_dense, load_source
from mla_convert.run.stream import stream_chunks
from mla_convert.zoo.digits.classifier import classify
from mla_convert.zoo.digits.data import FRAME, GUIDANCE, SHIFT

HERE = Path(__file__)
VIDEOS, FRAMES, STEPS = 40, 48, 8
STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


def centers(videos: Tensor) -> Tensor:
    """Where the ink of every frame is, `[N, F, 2]` pixels, of videos `[N, 1, F, H, W]`."""
    ink = (videos[:, 0] + 1).clamp_min(0)
    places = torch.arange(FRAME, dtype=torch.float32)
    mass = ink.sum((2, 3)).clamp_min(1e-6)
    return torch.stack([(ink.sum(3) * places).sum(2) / mass, (ink.sum(2) * places).sum(2) / mass], dim=-1)


def measured() -> list[dict[str, Any]]:
    """The figures of every strength."""
    model = load_dense(load_source("zoo:digits"))
    prompts = chosen_prompts(VIDEOS)
    wanted = [*prompts[5:], *prompts[:5]]
    source = real_videos(prompts, FRAMES, seed=0)
    shown, asked = (torch.tensor([prompt.digit for prompt in told]).unsqueeze(1) for told in (prompts, wanted))
    text, path = torch.stack([prompt.embedding() for prompt in wanted]), centers(source)
    found = []
    for strength in STRENGTHS:
        settings = {"num_inference_steps": STEPS, "shift": SHIFT, "guidance_scale": GUIDANCE}
        chunks = stream_chunks(model, text, None, FRAME, FRAME, source=source, strength=strength, **settings)
        videos = torch.cat(list(chunks), dim=2)
        classes = classify(videos)
        found.append(
            {
                "strength": strength,
                "level": round(SHIFT * strength / (1 + (SHIFT - 1) * strength), 6),
                "prompted": (classes == asked).float().mean().item(),
                "of_the_source": (classes == shown).float().mean().item(),
                "distance": (centers(videos) - path).norm(dim=-1).mean().item(),
            }
        )
        print(found[-1])
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The figures in Markdown."""
    lines = [
        "| strength | noise level | frames with the prompted digit | with the source's digit | pixels from its place |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found:
        shares = " | ".join(f"{100 * row[key]:.0f} %" for key in ("prompted", "of_the_source"))
        lines.append(f"| {row['strength']:g} | {row['level']:.2f} | {shares} | {row['distance']:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    found = measured()
    write_json(HERE.with_suffix(".json"), {"videos": VIDEOS, "frames": FRAMES, "steps": STEPS, "strengths": found})
    write_text(HERE.with_suffix(".md"), table(found))
    print(table(found))


if __name__ == "__main__":
    main()
