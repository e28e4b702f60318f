"""What a step asks of the processes and of the weights, and no more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import distill_case as case
import pytest
import torch

import mla_convert.distill.trainer as trainer
from mla_convert.distill.metrics import Metrics
from mla_convert.distill.requests import Requests


def rows(folder: Any) -> list[dict[str, Any]]:
    return Metrics(folder / "metrics.jsonl").rows()


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize(("minutes", "due"), [(None, False), (0.0, True), (60.0, False)])
def test_one_process_agrees_with_itself(stop, minutes, due):
    # It has neither a device nor a reduce.
    alone: Any = SimpleNamespace(is_main_process=True, num_processes=1)
    requests = Requests(alone, minutes)
    requests.stop = stop
    assert requests.agreed() == (stop, due)


def test_several_processes_add_up_what_they_ask():
    several: Any = SimpleNamespace(
        is_main_process=False,
        num_processes=2,
        device=torch.device("cpu"),
        reduce=lambda own, how: own + torch.tensor([1.0, 0.0]),
    )
    assert Requests(several, 0.0).agreed() == (True, False)


def test_the_distance_of_the_average_is_measured_with_the_heldout_loss(tmp_path, monkeypatch):
    measured = []
    distance = trainer.relative_distance
    monkeypatch.setattr(trainer, "relative_distance", lambda *given: measured.append(given) or distance(*given))
    case.train(tmp_path, steps=6, eval_every=4)
    found = [row["step"] for row in rows(tmp_path) if "ema_distance" in row]
    assert found == [row["step"] for row in rows(tmp_path)[1:] if "heldout_loss" in row] == [4, 6]
    assert len(measured) == 2
