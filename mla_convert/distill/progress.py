"""Reports the progress of long jobs."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..errors import visible
from ..sizes import duration

LINE_SECONDS = 30.0
"""Without a terminal, the seconds between two lines of a job."""

# Kernels and CUDA graphs.
_DEVICE_LOGGER = "mla_convert.mla"


class Report(Protocol):
    """Called with the name of a job, its steps done, its total steps, and a short text such as the loss."""

    def __call__(self, what: str, done: int, total: int, detail: str = "", /) -> None: ...


@contextlib.contextmanager
def progress_bars(console: Console | None = None) -> Iterator[Report]:
    """One bar per job, with the remaining time, on `console` (stderr by default); plain lines without a terminal."""
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        console=console or Console(stderr=True),
    )
    with reporting(bars) as report:
        yield report


@contextlib.contextmanager
def reporting(bars: Progress, amount: Callable[[int], str] = str) -> Iterator[Report]:
    """A Report that shows one bar of `bars` (with a field `detail`) per job, and nothing before the first report.

    Where their console is no terminal, a bar would appear only at the end: it prints `progress_lines` instead, with
    the steps as `amount` writes them.
    """
    console = bars.console
    if not console.is_jupyter and (not console.is_terminal or console.is_dumb_terminal):
        yield progress_lines(console, amount)
        return
    tasks: dict[str, TaskID] = {}

    def report(what: str, done: int, total: int, detail: str = "", /) -> None:
        detail = visible(detail)
        if not tasks:
            bars.start()
        if what not in tasks:
            tasks[what] = bars.add_task(what, detail=detail)
        bars.update(tasks[what], completed=done, total=total, detail=detail)

    try:
        yield report
    finally:
        # Stopping prints an empty line without a terminal.
        if tasks:
            bars.live.stop() if bars.live.transient else bars.stop()


@dataclass
class _Job:
    """When a line of a job was last printed, whether it has ended, and a report to count the time left from."""

    printed: float
    ended: bool = False
    since: tuple[float, int] | None = None


def progress_lines(
    console: Console, amount: Callable[[int], str] = str, clock: Callable[[], float] = time.monotonic
) -> Report:
    """A Report that prints lines such as `match_velocity 120/4000, loss 4.1e-06, 3 h 10 min left` on `console`.

    Each job has one when it begins, for its first step, and when it ends, and otherwise one every LINE_SECONDS. In a
    launch the first process alone prints. `clock` returns seconds.
    """
    jobs: dict[str, _Job] = {}

    def report(what: str, done: int, total: int, detail: str = "", /) -> None:
        now, begins = clock(), what not in jobs
        job = jobs.setdefault(what, _Job(now))
        ends = done >= total and not job.ended
        first = job.since is None and done > 0 and not begins
        due = begins or ends or first or now - job.printed >= LINE_SECONDS
        # Time before the first report of a step went into preparations.
        if (job.since is None and done > 0) or (job.since is not None and done < job.since[1]):
            job.since = (now, done)
        if not due or int(os.environ.get("RANK") or 0):
            return
        job.printed, job.ended = now, job.ended or done >= total
        parts = [f"{what} {amount(done)}/{amount(total)}", detail]
        if job.since is not None and job.since[1] < done < total:
            began, before = job.since
            parts.append(f"{duration((now - began) / (done - before) * (total - done))} left")
        line = ", ".join(part for part in parts if part)
        console.print(visible(line), soft_wrap=True, markup=False, emoji=False, highlight=False)

    return report


def leave_to_the_first() -> None:
    """Silence in this process what the first one says too: libraries' bars and warnings, and all notes but errors.

    On another machine, its first process still warns of what its own devices cannot do. What a user has set of the
    libraries' verbosity stays.
    """
    import diffusers.utils.logging
    import transformers.utils.logging
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    if "DIFFUSERS_VERBOSITY" not in os.environ:
        diffusers.utils.logging.set_verbosity_error()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers.utils.logging.set_verbosity_error()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.getLogger("mla_convert").setLevel(logging.ERROR)
    if not int(os.environ.get("LOCAL_RANK") or 0):
        logging.getLogger(_DEVICE_LOGGER).setLevel(logging.WARNING)
