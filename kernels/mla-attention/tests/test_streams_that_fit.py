"""The search for the number of streams that fit, which first tries the goal for latent streams; and that goal."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture
def search():
    """A search with paths that fit up to `limits` streams, ended after some probes; returns also the batches tried."""
    streams, timing, wan = (importlib.import_module(name) for name in ("streams", "timing", "wan"))

    def run(limits, probes=1000):
        tried, known = [], {}

        class Clock(timing.Budget):
            def __init__(self):
                pass

            def left(self):
                return probes - len(tried)

            def part(self, share):
                return self

        def fits(shape, build):
            # Builders first appear in the order of the ways, dense first.
            place = known.setdefault(build.__code__.co_firstlineno, len(known))
            tried.append((place, shape.batch))
            return shape.batch <= limits[place]

        return streams.streams(wan.Shape(), CPU, torch.float32, Clock(), fits), tried

    return run


@pytest.fixture
def report():
    return importlib.import_module("report")


def test_all_are_found(search, report):
    found, _ = search((11, 70, 3, 40))
    assert list(found["streams"].values()) == [11, 70, 3, 40] and found["open"] == {} == dict(found["left_out"])
    assert next(iter(found["streams"])) == report.TUNED
    assert report._streams(found) == (70 / 11, False)


def test_one_probe_behind_the_dense_ones_decides(search, report):
    found, tried = search((11, 70, 3, 40), probes=6)
    assert tried == [(0, 8), (0, 16), (0, 12), (0, 10), (0, 11), (1, 66)]
    assert found["streams"][report.PAIRED] == 66 and found["open"][report.PAIRED] == [66, None]
    assert report._streams(found) == (6.0, True)
    # If the first way does not hold this many, the next one is tried.
    assert search((11, 60, 80, 40))[1][5:7] == [(1, 66), (2, 66)]


def test_an_open_search_is_no_miss(search, report):
    found, _ = search((11, 60, 3, 40), probes=9)
    shape = {"chunk": 1, "tokens": 4, "window": 4}
    result = {"shape": shape, "streams": {**found, "gb": 80.0}}
    goal = next(goal for goal in report.goals(result) if goal["goal"] == "streams over dense in 80 GB")
    assert found["open"] and goal["measured"] < 6 and goal["reached"] is None and goal["least"]


def test_without_the_dense_number_there_is_no_ratio(search, report):
    found, _ = search((11, 70, 3, 40), probes=1)
    assert list(found["streams"].values()) == [8, None, None, None] and found["open"][report.TUNED] == [8, None]
    assert report._streams(found) == (None, False)
    assert search((2, 70, 3, 40), probes=1)[0]["streams"][report.TUNED] is None
    # At most eleven fit, because twelve do not.
    counts = {report.TUNED: 8, report.PAIRED: 66}
    assert report._streams({"streams": counts, "open": {report.TUNED: [8, 12]}}) == (6.0, True)


@pytest.mark.parametrize(("total", "wanted"), [(141e9, 80e9 / 141e9), (40e9, 1.0)])
def test_a_card_lends_no_more_than_80_gb(search, monkeypatch, total, wanted):
    streams, fractions = importlib.import_module("streams"), []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    with streams._limited(torch.device("cuda")):
        assert fractions == [wanted]
    assert fractions[-1] == 1.0 and streams._memory(torch.device("cuda")) == min(total, 80e9)
