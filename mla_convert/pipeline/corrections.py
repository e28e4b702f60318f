"""What a recipe may say otherwise once its run has begun: bookkeeping, and settings that no step done has read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from ..distill.trainer import BOOKKEEPING
from ..recipe.explain import describe
from ..recipe.load import differences

LATE = {
    "evaluate": ("evaluate",),
    "generate": ("samples", "report"),
    "streaming": ("evaluate", "samples"),
    "export": ("export",),
}
"""The sections that no training depends on, and that commands of their own take, with the steps that read them."""


class Change(NamedTuple):
    """A key of a dumped recipe that has another value than when the run began."""

    key: str
    old: Any
    new: Any

    @property
    def section(self) -> str:
        return self.key.split(".")[0]

    def __str__(self) -> str:
        return f"{self.key} is {describe(self.new)} and was {describe(self.old)}"


def changes(
    recorded: Mapping[str, Any], resolved: Mapping[str, Any], done: Collection[str]
) -> tuple[list[Change], list[Change]]:
    """What differs between two dumped recipes: what a run with the steps `done` can take over, and what it cannot."""
    taken: list[Change] = []
    refused: list[Change] = []
    for difference in differences(recorded, resolved):
        change = Change(*difference)
        (taken if _can_change(change, recorded, done) else refused).append(change)
    return taken, refused


def _can_change(change: Change, recorded: Mapping[str, Any], done: Collection[str]) -> bool:
    section, *keys = change.key.split(".")
    if section == "data":
        # Damaged clips; the order of the others stays as it is.
        return keys[0] == "skip"
    if section == "distill":
        return len(keys) > 1 and keys[1] in BOOKKEEPING
    if section not in LATE:
        return False
    readers = {*LATE[section]}
    # A stage that may be under way measures itself on these clips.
    if change.key == "evaluate.clips" and recorded["distill"]:
        readers.add("convert")
    if section == "generate" and recorded["convert"]["calibration"]["source"] == "rollouts":
        readers.add("convert")
    return readers.isdisjoint(done)
