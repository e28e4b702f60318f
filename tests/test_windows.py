"""Rollouts with every window that source models use equal the forward of the whole clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from torch import Tensor

from mla_convert.errors import UsageError
from mla_convert.load import load_source
from mla_convert.pipeline.channels import check_channels
from mla_convert.run.stream import stream_chunks

# Relative to the largest magnitude; the largest error seen on a CPU stands beside it.
FLOAT32 = 2e-6  # 3.4e-7

WINDOWS = [
    {"num_frames_per_block": 1, "window_frames": 4},
    {"num_frames_per_block": 1, "window_frames": 6, "sink_frames": 2},
    {"num_frames_per_block": 3, "window_frames": 6},
    {"num_frames_per_block": 3, "window_frames": 9, "sink_frames": 3, "sink_positions": "absolute"},
    {"num_frames_per_block": 3, "window_frames": 8, "sink_frames": 1, "independent_first_frame": True},
]


@pytest.mark.parametrize("context_noise", [0.0, 0.2])
@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: "-".join(map(str, w.values())))
@pytest.mark.parametrize("variant", [None, pico.VARIANTS[6], pico.VARIANTS[1]], ids=["dense", "exact", "latent"])
def test_rollout_equals_the_whole_clip_given_its_context(
    variant: dict[str, Any] | None, window: dict[str, Any], context_noise: float
) -> None:
    """All chunks' steps at one noise level equal one forward of the clip with the written chunks as context."""
    dense = pico.dense_model(causal=window)
    model = dense if variant is None else pico.convert(dense, **variant)
    seen: dict[float, list[tuple[Tensor, Tensor]]] = {}
    written: list[Tensor] = []
    forward_chunk = model.forward_chunk

    def watched(x: Tensor, timestep: Tensor, *rest: Any, write: bool = False, **more: Any) -> Tensor:
        velocity = forward_chunk(x, timestep, *rest, write=write, **more)
        if write:
            assert timestep.tolist() == pytest.approx([1000 * context_noise] * 2)
            written.append(x)
        else:
            seen.setdefault(float(timestep[0]), []).append((x, velocity))
        return velocity

    model.forward_chunk = watched
    _, _, text = pico.inputs(2, 1, 4, 4)
    frames = 14  # wraps every window and ends in a short chunk where chunks have three frames
    chunks = list(stream_chunks(model, text, frames, 4, 4, num_inference_steps=2, context_noise=context_noise))
    assert [chunk.shape[2] for chunk in chunks] == [b - a for a, b in model.causal.chunks(frames)]
    assert torch.equal(torch.cat(written, dim=2), torch.cat(chunks[:-1], dim=2)) == (context_noise == 0)
    # The last chunk is the context of none and was not written.
    context = torch.cat([*written, torch.zeros_like(chunks[-1])], dim=2)
    assert sorted(seen) == [500.0, 1000.0]
    for t, steps in seen.items():
        x, velocity = (torch.cat(parts, dim=2) for parts in zip(*steps, strict=True))
        packed = model(
            x,
            torch.full((2, frames), t),
            text,
            context=context,
            context_timestep=torch.full((2,), 1000 * context_noise),
        ).sample
        assert pico.relative_error(velocity, packed) < FLOAT32


def test_clips_whose_images_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    pico.dense_model(in_channels=6).save_pretrained(tmp_path)
    clip = {"latents": torch.zeros(2, 4, 6, 4), "encoder_hidden_states": torch.zeros(3, 8)}
    source = load_source(str(tmp_path))
    check_channels({**clip, "image_latents": torch.zeros(4, 4, 6, 4)}, source, "data")
    with pytest.raises(UsageError, match=r"^data: image_latents have 3 channels, .* takes 4 \(in_channels less out"):
        check_channels({**clip, "image_latents": torch.zeros(3, 4, 6, 4)}, source, "data")
