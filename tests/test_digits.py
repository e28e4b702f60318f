"""The embedded teacher: its data, its classifier, and its quality."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mla_convert.evaluate.config import EvaluateConfig
from mla_convert.evaluate.rollouts import digit_rollouts
from mla_convert.load import load_dense, load_source
from mla_convert.run.stream import stream_chunks
from mla_convert.zoo.digits.classifier import classify
from mla_convert.zoo.digits.data import (
    CELLS,
    DIRECTIONS,
    FRAME,
    Prompt,
    all_prompts,
    digit_images,
    parse_prompt,
    render,
    sample_batch,
)


def test_a_digit_bounces_and_stays_in_the_frame() -> None:
    path = Prompt(3, 0, 2, "down-right").path(9)
    assert path[:, 0].tolist() == [0, 4, 8, 4, 0, 4, 8, 4, 0]
    assert path[:, 1].tolist() == [8, 4, 0, 4, 8, 4, 0, 4, 8]
    for prompt in all_prompts("train")[::37]:
        assert prompt.path(40).min() >= 0
        assert prompt.path(40).max() <= FRAME - 8


def test_splits_share_nothing_and_cover_everything() -> None:
    train, heldout = (set(all_prompts(split)) for split in ("train", "heldout"))
    assert not train & heldout
    assert len(train | heldout) == 10 * CELLS**2 * len(DIRECTIONS) == 720
    images = [digit_images(split)[0].flatten(1) for split in ("train", "heldout")]
    assert len(images[0]) + len(images[1]) == 1797
    assert not {x.numpy().tobytes() for x in images[0]} & {x.numpy().tobytes() for x in images[1]}


def test_videos_show_the_digit_on_its_path() -> None:
    batch = sample_batch(3, 5, np.random.default_rng(0))
    assert batch.videos.shape == (3, 1, 5, FRAME, FRAME)
    assert batch.videos.amin() == -1
    assert batch.videos.amax() <= 1
    image = digit_images("train")[0][0]
    video = render(image, Prompt(0, 1, 1, "up").path(2))
    assert torch.equal(video[0, 1, 0:8, 4:12], image)
    assert video[0, 1, 8:].eq(-1).all()


def test_embeddings_tell_all_prompts_apart() -> None:
    vectors = torch.stack([p.embedding().flatten() for split in ("train", "heldout") for p in all_prompts(split)])
    assert len(vectors.unique(dim=0)) == 720


@pytest.mark.parametrize("text", ["7 at 2,1 moving up-left", " a 7 AT 2,1 moving UP-left "])
def test_prompts_are_read(text: str) -> None:
    assert parse_prompt(text) == Prompt(7, 2, 1, "up-left")
    assert parse_prompt(str(parse_prompt(text))) == Prompt(7, 2, 1, "up-left")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seven", "write for example '7 at 2,1 moving up-left'"),
        ("7 moving sideways", "one of up-left, up, up-right"),
        ("7 at 3,0", "outside the 3x3 cells 0,0 to 2,2"),
    ],
)
def test_prompts_that_mean_nothing_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_prompt(text)


def test_the_judge_reads_real_heldout_digits() -> None:
    images, classes = digit_images("heldout")
    videos = torch.stack([render(image, np.array([[y, x]])) for image in images for y, x in ((0, 0), (4, 8))])
    accuracy = (classify(videos)[:, 0] == classes.repeat_interleave(2)).float().mean()
    assert accuracy > 0.97  # 0.995 over all places


def test_the_teacher_draws_what_heldout_prompts_ask_for() -> None:
    """Uses a third of the held-out prompts; the card's figures come from all of them, with three seeds."""
    teacher = load_dense(load_source("zoo:digits"))
    config = EvaluateConfig(rollout_prompts=24, shift=3.0, guidance_scale=3.0)
    _, right = digit_rollouts(teacher, 16, config)
    assert right[:, -1].float().mean() >= 0.85


def test_guidance_of_one_is_no_guidance() -> None:
    teacher = load_dense(load_source("zoo:digits"))
    text = parse_prompt("4").embedding().unsqueeze(0)
    steps = {"num_inference_steps": 2, "seed": 5}
    plain = torch.cat(list(stream_chunks(teacher, text, 7, FRAME, FRAME, **steps)), dim=2)
    same = stream_chunks(teacher, text, 7, FRAME, FRAME, guidance_scale=1.0, **steps)
    other = stream_chunks(teacher, text, 7, FRAME, FRAME, guidance_scale=3.0, **steps)
    nothing_to_guide = stream_chunks(
        teacher, text, 7, FRAME, FRAME, guidance_scale=3.0, negative_hidden_states=text, **steps
    )
    assert torch.equal(torch.cat(list(same), dim=2), plain)
    assert not torch.allclose(torch.cat(list(other), dim=2), plain, atol=1e-3)
    # Equal halves of the batch cancel up to rounding; 2.1e-6 was seen.
    torch.testing.assert_close(torch.cat(list(nothing_to_guide), dim=2), plain, atol=2e-5, rtol=0)
