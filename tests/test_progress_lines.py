"""What a run says of its progress where there is no terminal, as under Slurm or in a file."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mla_convert.distill.progress import progress_bars, progress_lines


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


def test_a_training_has_a_line_at_its_begin_its_first_step_its_end_and_every_30_seconds(log: io.StringIO) -> None:
    now = 0.0
    report = progress_lines(Console(file=log), clock=lambda: now)
    report("match_velocity", 0, 4000)
    # The held-out losses before the first step do not count as steps.
    for done in range(1, 4001):
        now = 1000.0 + 3 * done
        report("match_velocity", done, 4000, f"loss {1 / done:.2g}")
    lines = log.getvalue().splitlines()
    assert lines[:3] == [
        "match_velocity 0/4000",
        "match_velocity 1/4000, loss 1",
        "match_velocity 11/4000, loss 0.091, 3 h 19 min left",
    ]
    assert lines[-2:] == ["match_velocity 3991/4000, loss 0.00025, 27 s left", "match_velocity 4000/4000, loss 0.00025"]
    assert len(lines) == 3 + 399


def test_short_jobs_have_a_line_at_their_begin_and_end(log: io.StringIO) -> None:
    with progress_bars(Console(file=log, width=20)) as report:
        for done in range(1, 31):
            report("calibrate", done, 30)
            assert "calibrate 1/30\n" in log.getvalue()
        report("write", 1, 1, "[red]a name that is longer than the console")
        # Without a known end, each chunk is the last so far.
        for done in range(1, 9):
            report("generate", done, done)
    expected = ["calibrate 1/30", "calibrate 30/30", "write 1/1, [red]a name that is longer than the console"]
    assert log.getvalue().splitlines() == [*expected, "generate 1/1"]


def test_a_resumed_job_has_its_time_left_from_its_own_steps(log: io.StringIO) -> None:
    now = 0.0
    report = progress_lines(Console(file=log), clock=lambda: now)
    for done in (25, 26, 30):
        now += 600
        report("match_velocity", done, 100)
    assert log.getvalue().splitlines()[-1] == "match_velocity 30/100, 4 h 40 min left"


def test_only_the_first_process_prints(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with progress_bars(Console(file=log)) as report:
        report("calibrate", 1, 1)
    assert not log.getvalue()
