"""Tells which keys of a recipe may change in a run that has begun: those no finished step and no weight depends on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from ..explain import describe
from ..export.same_run import LATE, decisive
from ..recipe.load import differences

READERS = {
    "evaluate": ("evaluate",),
    "generate": ("samples", "report"),
    "streaming": ("evaluate", "samples"),
    "export": ("export",),
}
"""The steps that read the sections which training does not depend on."""


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
    fixed = {key for key, _, _ in differences(decisive(recorded), decisive(resolved))}
    for difference in differences(recorded, resolved):
        change = Change(*difference)
        (refused if change.key in fixed or _was_read(change, recorded, done) else allowed).append(change)
    return allowed, refused


def _was_read(change: Change, recorded: Mapping[str, Any], done: Collection[str]) -> bool:
    """Whether one of the steps `done` has read a key that does not decide the weights."""
    readers = {*READERS[change.section]} if change.section in LATE else set()
    # A stage that is already training may compute its held-out loss on these clips.
    if change.key == "evaluate.clips" and recorded["distill"]:
        readers.add("convert")
    if change.section == "generate" and recorded["convert"]["calibration"]["source"] == "rollouts":
        readers.add("convert")
    return not readers.isdisjoint(done)
