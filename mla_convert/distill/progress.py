"""Reports the progress of long jobs."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
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

# Kernels and CUDA graphs.
_DEVICE_LOGGER = "mla_convert.mla"


class Report(Protocol):
    """Called with the name of a job, its steps done, its total steps, and a short text such as the loss."""

    def __call__(self, what: str, done: int, total: int, detail: str = "", /) -> None: ...


@contextlib.contextmanager
def progress_bars(console: Console | None = None) -> Iterator[Report]:
    """One bar per job, with the remaining time, on `console` (stderr by default)."""
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
def reporting(bars: Progress) -> Iterator[Report]:
    """A Report that shows one bar of `bars` (with a field `detail`) per job, and nothing before the first report."""
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
