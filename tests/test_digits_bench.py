"""Digits-Bench end to end: the numbers of constructed rollouts, and the section of the report that shows them."""

from __future__ import annotations

import json

import pytest
import torch

from mla_convert.evaluate import digits_bench as db
from mla_convert.evaluate.config import EvaluateConfig
from mla_convert.evaluate.digits_section import METRICS, SOURCES, tables
from mla_convert.evaluate.report import render_html
from mla_convert.evaluate.rollouts import chosen_prompts
from mla_convert.zoo.digits.data import CLIP_FRAMES

CONFIG = EvaluateConfig(rollout_prompts=20, rollout_seeds=2, long_factor=3, factors=(2,), sampler="renoise")


@pytest.fixture(scope="module")
def bench():
    """A teacher that draws real videos, and a student whose frames are empty after the training length."""

    def drawn(model, num_frames, config, progress):
        assert config.sampler == ("euler" if model == "real" else "renoise")
        video = db.real_videos(chosen_prompts(config.rollout_prompts), num_frames, config.seed + 50)
        if model == "fades":
            video[:, :, CLIP_FRAMES:] = -1
        progress(num_frames, num_frames)
        return video, None

    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(db, "digit_rollouts", drawn)
        found = db.digits_bench(
            {"teacher": "real", "student": "fades"}, CONFIG, lambda what, done, total: told.append((what, done, total))
        )
    assert told[-1] == ("rollouts of the student", 6 * CLIP_FRAMES, 6 * CLIP_FRAMES)
    return found


def test_prompts_of_every_digit_come_first() -> None:
    digits = [prompt.digit for prompt in chosen_prompts(24)]
    assert set(digits) == set(range(10))
    assert len(set(map(str, chosen_prompts(72)))) == 72
    assert chosen_prompts(100)[72:] == chosen_prompts(28)


def test_lengths_and_accuracy(bench) -> None:
    found, accuracy = bench
    assert list(found["lengths"]) == ["1x", "2x", "3x"] and list(accuracy["teacher"]) == ["1x", "2x", "3x"]
    assert accuracy["teacher"]["3x"] > 0.95 and accuracy["student"]["1x"] > 0.95
    # A dark frame is one digit to the classifier, whatever was asked for.
    assert accuracy["student"]["3x"] < 0.3
    assert found["seeds"] == 2 and len(found["digit_accuracy_by_frame"]["student"]) == 3 * CLIP_FRAMES


def test_a_rollout_that_fades_drifts_and_is_far_from_real_videos(bench) -> None:
    short, long = bench[0]["lengths"]["1x"], bench[0]["lengths"]["3x"]
    assert short["student"]["drift"]["digit_accuracy"]["mean"] == pytest.approx(0, abs=0.05)
    assert long["student"]["drift"]["digit_accuracy"]["mean"] < -0.6
    assert long["teacher"]["drift"]["digit_accuracy"]["mean"] == pytest.approx(0, abs=0.05)
    # Two samples of the same videos: observed 23 and 24; a faded one 6e2.
    assert long["teacher"]["frechet_distance"]["mean"] < 2 * long["real"]["frechet_distance"]["mean"]
    assert long["student"]["frechet_distance"]["mean"] > 5 * long["real"]["frechet_distance"]["mean"]
    low, mean, high = (long["student"]["digit_accuracy"][key] for key in ("low", "mean", "high"))
    assert low < mean < high


def test_report_shows_every_metric(bench) -> None:
    found = bench[0]
    json.dumps(found, allow_nan=False)
    shown = tables(found)
    assert [len(table["rows"]) for table in shown] == [len(METRICS) + 1] * 3
    assert all(len(row["cells"]) == len(SOURCES) for table in shown for row in table["rows"])
    page = render_html({"digits_bench": found})
    assert "48 frames (3 × the training length)" in page and "Recognition over time" in page
    assert all(name in page for name, _ in METRICS.values())


def test_lengths_are_shown_from_short_to_long(bench) -> None:
    """Even if JSON puts 16x before 3x."""
    lengths = bench[0]["lengths"]
    longer = {"16x": lengths["3x"], **lengths}
    titles = [table["title"] for table in tables({**bench[0], "lengths": longer})]
    assert titles[-1].startswith("256 frames") and titles[:-1] == [t["title"] for t in tables(bench[0])]


def test_a_real_rollout() -> None:
    from mla_convert.load import load_dense, load_source

    torch.manual_seed(0)
    model = load_dense(load_source("zoo:digits"), torch.float32)
    config = EvaluateConfig(rollout_prompts=2, long_factor=0, num_inference_steps=2, shift=3.0)
    found, accuracy = db.digits_bench({"teacher": model, "student": model}, config, lambda *_: None)
    assert list(found["lengths"]) == ["1x"] and accuracy["teacher"] == accuracy["student"]
    assert found["lengths"]["1x"]["teacher"] == found["lengths"]["1x"]["student"]
