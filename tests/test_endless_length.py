"""Rollouts of any length: what is computed before the first frame does not grow with it."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pico
import pytest
import torch
from recipe_case import write_teacher

from mla_convert.cli import main
from mla_convert.errors import UsageError
from mla_convert.mla.window import CausalConfig
from mla_convert.run.extent import check_start
from mla_convert.run.stream import stream_chunks

ENDLESS = 10**10


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("digits"))


@pytest.mark.parametrize("first", [False, True])
def test_chunk_ranges_come_one_by_one_and_are_those_of_a_clip(first: bool) -> None:
    causal = CausalConfig(num_frames_per_block=3, independent_first_frame=first)
    expected = [(0, 1), (1, 4), (4, 7), (7, 10)] if first else [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert causal.chunks(10) == list(causal.chunk_ranges(10)) == expected
    assert list(itertools.islice(causal.chunk_ranges(ENDLESS), 3)) == expected[:3]


def test_a_rollout_of_ten_billion_frames_yields_its_first_chunk_at_once() -> None:
    model = pico.dense_model()
    text = torch.zeros(1, 3, model.config.text_dim)
    start = torch.zeros(1, model.config.in_channels, model.causal.num_frames_per_block, 4, 4)
    tracemalloc.start()
    for given in (None, start):
        chunks = stream_chunks(model, text, ENDLESS, 4, 4, num_inference_steps=1, start=given)
        assert next(chunks).shape[2] == model.causal.num_frames_per_block
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A list of all chunks would take more than 100 GB.
    assert peak < 20e6


def test_the_chunks_that_a_start_may_end_with_are_named_at_any_length() -> None:
    causal, shape = CausalConfig(num_frames_per_block=3), (1, 4, 4)
    check_start(torch.zeros(1, 1, 6, 4, 4), causal, ENDLESS, shape)
    with pytest.raises(UsageError, match="give 3 or 6 latent frames"):
        check_start(torch.zeros(1, 1, 5, 4, 4), causal, ENDLESS, shape)
    check_start(torch.zeros(1, 1, 5, 4, 4), causal, 5, shape)


@pytest.mark.parametrize("name", ["x.gif", "x.safetensors"])
def test_a_file_kept_in_memory_is_refused_if_it_cannot_fit(
    capsys: Any, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    arguments = ["generate", str(digits), "--prompt", "7", "--steps", "1", "-o", str(tmp_path / name)]
    assert main([*arguments, "--seconds", "1e9"]) == 2
    err = capsys.readouterr().err
    assert "is kept in memory until its end, and 8,000,000,000 frames take" in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=6 * 256 * 256))
    assert main([*arguments, "--frames", "6"]) == 0
