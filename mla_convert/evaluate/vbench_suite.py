"""Reads VBench's standard prompts and generates the videos that it expects, under the names that it expects.

The prompts come from the user's checkout of VBench (arXiv 2311.17982, https://github.com/Vchitect/VBench). This
package contains no part of VBench.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..distill.progress import Report
from ..errors import UsageError, UserError
from ..files import unreadable
from ..run.prefetch import FrameWriter
from ..run.video import Written

DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
    "object_class",
    "multiple_objects",
    "human_action",
    "color",
    "spatial_relationship",
    "scene",
    "appearance_style",
    "temporal_style",
    "overall_consistency",
)
FLICKERING = "temporal_flickering"
FLICKERING_FACTOR = 5
"""Factor on the samples of flickering prompts, because VBench drops videos with motion (its prompts/README.md)."""
INFO = "vbench/VBench_full_info.json"
ORDER = "prompts/all_dimension.txt"

Draw = Callable[[str, int], Iterator[Written]]
"""Generates the frames of a video, chunk by chunk, from a prompt and a seed."""


@dataclass(frozen=True)
class Prompt:
    """One standard prompt: `text` names its videos, `dimensions` use it, and `told` is the prompt for the model."""

    text: str
    dimensions: tuple[str, ...]
    told: str


@dataclass(frozen=True)
class Video:
    """One video to generate: `PROMPT-INDEX.mp4`, from the noise of `seed`."""

    prompt: Prompt
    index: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.prompt.text}-{self.index}.mp4"


def read_suite(checkout: Path, longer: Path | None = None) -> list[Prompt]:
    """All standard prompts of a checkout, each once.

    `longer` is a file of rewritten prompts, one for each line of the checkout's `prompts/all_dimension.txt`; the model
    gets these instead of the short ones. Raises UserError in one line.
    """
    try:
        entries = json.loads((checkout / INFO).read_text(encoding="utf-8"))
        dimensions: dict[str, dict[str, None]] = {}
        for entry in entries:
            dimensions.setdefault(entry["prompt_en"], {}).update(dict.fromkeys(entry["dimension"]))
    except OSError:
        raise UserError(f"{checkout} is not a checkout of VBench; it has no {INFO}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{checkout / INFO} is not the prompt list of VBench 0.1; check out its repository again"
        ) from None
    if unfit := next((text for text in dimensions if "/" in text), None):
        raise UserError(f"the prompt {unfit!r} of {checkout / INFO} cannot be a file name; remove it")
    rewritten = {} if longer is None else _rewritten(checkout / ORDER, longer)
    if longer is not None and (unknown := next((text for text in dimensions if text not in rewritten), None)):
        raise UserError(f"{longer} has no line for {unknown!r}, because {checkout / ORDER} lacks this prompt")
    return [Prompt(text, tuple(of), rewritten.get(text, text)) for text, of in dimensions.items()]


def _rewritten(order: Path, longer: Path) -> dict[str, str]:
    short, long = (_lines(path) for path in (order, longer))
    if len(short) != len(long):
        raise UserError(f"{longer} has {len(long)} lines, {order} {len(short)}; give one for each")
    return dict(zip(short, long, strict=True))


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompts from {path}: {unreadable(error)}") from None


def check_dimensions(dimensions: Sequence[str]) -> tuple[str, ...]:
    """The given dimensions in VBench's order, or all if none are given. Raises UsageError for an unknown one."""
    if unknown := [name for name in dimensions if name not in DIMENSIONS]:
        raise UsageError(f"VBench has no dimension {unknown[0]}; it has {', '.join(DIMENSIONS)}")
    return tuple(name for name in DIMENSIONS if not dimensions or name in dimensions)


def wanted_videos(
    suite: Sequence[Prompt], dimensions: Sequence[str], samples: int, long: bool, seed: int
) -> list[Video]:
    """The videos that the dimensions need: `samples` per prompt, each with a different seed.

    Unless `long`, prompts of temporal flickering get `FLICKERING_FACTOR` times as many. A video's seed depends only
    on its prompt, its index and `seed`, not on the other videos.
    """
    videos = []
    for prompt in suite:
        wanted = set(dimensions) & set(prompt.dimensions)
        if wanted:
            factor = FLICKERING_FACTOR if FLICKERING in wanted and not long else 1
            videos += [Video(prompt, index, _seed(seed, prompt.text, index)) for index in range(factor * samples)]
    return videos


def _seed(seed: int, text: str, index: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}/{text}".encode()).digest()[:4], "big")


def draw_videos(videos: Sequence[Video], folder: Path, draw: Draw, fps: float, report: Report) -> int:
    """Generate the videos that are missing in `folder`, each complete or not at all; return their number.

    A thread encodes the frames, and finishes a video while the next one starts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # VBench takes the suffix of the first file in the folder as that of all videos.
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    drawn, writers = 0, deque[FrameWriter]()
    try:
        for done, video in enumerate(videos):
            report("videos", done, len(videos), video.name)
            if (folder / video.name).exists():
                continue
            writers.append(FrameWriter(folder / video.name, fps))
            for frames in draw(video.prompt.told, video.seed):
                writers[-1].put(frames)
            writers[-1].end()
            drawn += 1
            if len(writers) > 1:
                writers.popleft().close()
        while writers:
            writers.popleft().close()
    except BaseException:
        for writer in writers:
            writer.abort()
        raise
    report("videos", len(videos), len(videos))
    return drawn
