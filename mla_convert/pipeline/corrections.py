"""Decides which keys of a recipe may change after a run has begun: bookkeeping, and keys no finished step has read."""

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
"""Sections that training does not depend on, with the steps that read them. Each has a command of its own."""


class Change(NamedTuple):
    """A key of a dumped recipe whose value differs from the one with which the run began."""

    key: str
    old: Any
    new: Any

    @property
    def section(self) -> str:
        return self.key.split(".")[0]

    def __str__(self) -> str:
        return f"{self.key} was {describe(self.old)} and is now {describe(self.new)}"


def changes(
    recorded: Mapping[str, Any], resolved: Mapping[str, Any], done: Collection[str]
) -> tuple[list[Change], list[Change]]:
    """Compare two dumped recipes: returns the changes that a run with the steps `done` allows, and the others."""
    allowed: list[Change] = []
    refused: list[Change] = []
    for difference in differences(recorded, resolved):
        change = Change(*difference)
        (allowed if _can_change(change, recorded, done) else refused).append(change)
    return allowed, refused


def _can_change(change: Change, recorded: Mapping[str, Any], done: Collection[str]) -> bool:
    section, *keys = change.key.split(".")
    if section == "data":
        # Skipping a damaged clip keeps the order of the others.
        return keys[0] == "skip"
    if section == "distill":
        return len(keys) > 1 and keys[1] in BOOKKEEPING
    if section not in LATE:
        return False
    readers = {*LATE[section]}
    # A stage that is already training may compute its held-out loss on these clips.
    if change.key == "evaluate.clips" and recorded["distill"]:
        readers.add("convert")
    if section == "generate" and recorded["convert"]["calibration"]["source"] == "rollouts":
        readers.add("convert")
    return readers.isdisjoint(done)
