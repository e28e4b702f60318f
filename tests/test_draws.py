"""Every use of a seed has its own draws, and those behind the documentation's figures stay the same."""

from __future__ import annotations

import torch

from mla_convert.draws import Use, drawn, drawn_seed


def test_the_figures_of_the_documentation_keep_their_draws() -> None:
    """Numbers that must not change: `docs/study.md` and the demo were made with them."""
    kept = {"CALIBRATION_NOISE": 1, "SAMPLE": 2, "PROJECTION": 3, "INIT": 4, "ORDER": 1, "NOISE": 2, "SHARED": 3}
    assert {name: Use[name].value for name in kept} == kept
    assert drawn(Use.INIT, 0, 1).initial_seed() == 15467886198378882463
    assert drawn(Use.NOISE, 0, 1, 5).initial_seed() == 14689790041066673764


def test_adapters_and_rollouts_have_draws_of_their_own() -> None:
    numbers = list(Use.__members__.values())
    assert numbers.count(Use.ADAPTERS) == numbers.count(Use.ROLLOUT) == 1
    # A layer, a stage or a shard of the same number.
    seeds = {drawn(use, 7, 1).initial_seed() for use in (Use.INIT, Use.ADAPTERS, Use.ROLLOUT)}
    assert len(seeds) == 3
    assert len({drawn_seed(use, 7, 1) for use in (Use.INIT, Use.ADAPTERS, Use.ROLLOUT)}) == 3


def test_the_same_numbers_draw_the_same() -> None:
    first, again = (torch.randn(4, generator=drawn(Use.SAMPLE, 3, 2, 1)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.randn(4, generator=drawn(Use.SAMPLE, 3, 2, 2)))
