"""Manages a run folder: records which steps are done, with digests of the files they wrote.

A step writes its output completely or not at all, and is then marked done in `state.json`. A run that
was killed at any moment repeats at most the step it was in.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..distill.identity import Identity, other_clips
from ..distill.shard_files import of_all
from ..errors import UsageError, UserError
from ..export.evidence import RECIPE
from ..export.same_run import LATE
from ..files import MANIFEST, RUN_STATE, claim_folder, discard_folder, locked_folder, sha256, write_json, write_text
from ..recipe.load import has_key
from ..recipe.schema import Recipe
from .corrections import Change, changes

STATE, RESOLVED, STOPPED = RUN_STATE, RECIPE, ".stopped"
FORMAT = 1
_RETRY_SECONDS = 0.5


class RunDir:
    """The run folder of one recipe, locked against a second process until `close`.

    `resume` continues a run of the same recipe; a folder with no finished step needs no `resume`. `begun` says whether
    there is a run to continue. `changed` lists the keys that differ from the recorded recipe and are allowed to (see
    `corrections`); `begin` records the new values. Nothing but a mark is written before `begin`. Raises UserError if
    the folder is not a run folder, if another process works in it, or if it has finished steps and `resume` is False;
    UsageError, naming the key, if the recipe differs where it must not.
    """

    def __init__(self, path: Path, recipe: Recipe, resume: bool) -> None:
        self.path, self.recipe = path, recipe
        self.changed: list[Change] = []
        self._corrupt: list[Path] = []
        self.begun = (path / STATE).exists()
        claim_folder(path, "run folder", (MANIFEST, RUN_STATE, STOPPED))
        self._lock = contextlib.ExitStack()
        self._lock.enter_context(locked_folder(path))
        try:
            self._state = self._continued(resume)
        except BaseException:
            self.close()
            raise

    def _continued(self, resume: bool) -> dict[str, Any]:
        """The state of the run so far, or of a new run."""
        current: dict[str, Any] = {"recipe_sha256": self.recipe.sha256(), "recipe": self.recipe.model_dump(mode="json")}
        if self.begun:
            state = read_state(self.path)
            if state["steps"]:
                self.changed = self._allowed_changes(state["recipe"], current["recipe"], state["steps"])
                if not resume:
                    how = "was started before; continue it with --resume"
                    if state["finished"]:
                        how = "is finished; --resume shows its result"
                    raise UserError(f"the run in {self.path} {how}, or give another --out")
                if any(change.section in (*LATE, "data") for change in self.changed):
                    # The exported checkpoint records the recipe, and `evaluate` reads its data section.
                    state["steps"].pop("export", None)
                return {**state, **current}
        return {"format": FORMAT, **current, "finished": False, "steps": {}}

    def begin(self) -> None:
        """Record the recipe and the state, and delete files that are corrupt or left half-written."""
        for leftover in self.path.glob(".*.tmp"):
            discard_folder(leftover) if leftover.is_dir() else leftover.unlink()
        for file in self._corrupt:
            # A step may reuse existing files.
            file.unlink(missing_ok=True)
        self._corrupt = []
        (self.path / STOPPED).unlink(missing_ok=True)
        self._save()
        write_text(self.path / RESOLVED, self.recipe.dump())

    def close(self) -> None:
        """Unlock the folder, and remove it if this run created it and wrote nothing to it."""
        self._lock.close()

    @property
    def finished(self) -> Mapping[str, Any]:
        """What is recorded of each finished step, by name."""
        steps: Mapping[str, Any] = self._state["steps"]
        return steps

    @property
    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds of each finished step."""
        return {name: step["seconds"] for name, step in self.finished.items()}

    @property
    def outputs(self) -> dict[str, str]:
        """The recorded digests of what finished steps wrote, by path relative to the run folder."""
        return {name: digest for step in self.finished.values() for name, digest in step["outputs"].items()}

    def is_done(self, step: str) -> bool:
        return step in self._state["steps"]

    def verify(self, order: Iterable[str]) -> str | None:
        """Mark the first step whose output is missing or changed, and all later ones, as not done; returns its name.

        Only files whose size or time differs from what was recorded are hashed. `begin` then deletes that step's
        changed files. Files that it did not write are the user's and stay. Raises UserError for one to be deleted
        outside the folder.
        """
        names = list(order)
        for position, name in enumerate(names):
            recorded = self._state["steps"].get(name)
            if recorded is None:
                continue
            written = recorded["outputs"]
            found = self._found(recorded)
            if found == written:
                recorded["files"] = self._stats(written)
                continue
            self._corrupt = [self.path / file for file in found if found[file] != written[file]]
            for file in self._corrupt:
                if not file.parent.resolve().is_relative_to(self.path.resolve()):
                    raise UserError(f"{self.path / STATE} names {file}, which is outside; start again elsewhere")
            for later in names[position:]:
                self._state["steps"].pop(later, None)
            self._state["finished"] = False
            return name
        return None

    def mark_done(self, step: str, paths: Iterable[str], seconds: float, clips: Identity | None = None) -> None:
        """Record that `step` wrote `paths`, files or folders relative to the run folder, and which clips it read."""
        written = sorted(paths)
        files = self._files(written)
        self._state["steps"][step] = {
            "paths": written,
            "files": self._stats(files),
            "outputs": dict(zip(files, of_all(sha256, (self.path / file for file in files)), strict=True)),
            "seconds": round(seconds, 3),
            **({} if clips is None else {"clips": clips}),
            "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self._save()

    def mark_finished(self) -> None:
        self._state["finished"] = True
        self._save()

    def mark_stopped(self) -> None:
        """Tell whoever started the run that a signal ended it and that it can go on; the next `begin` removes the mark.

        The exit code does not tell: launchers have their own.
        """
        with contextlib.suppress(OSError):
            (self.path / STOPPED).touch()

    def _save(self) -> None:
        write_json(self.path / STATE, self._state)

    def _files(self, paths: Iterable[str]) -> list[str]:
        """The files in `paths`, relative to the run folder."""
        files = []
        for name in paths:
            path = self.path / name
            files += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        return [file.relative_to(self.path).as_posix() for file in files if file.is_file()]

    def _stats(self, files: Iterable[str]) -> dict[str, list[int]]:
        """Size in bytes and time in ns of the `files` that exist."""
        stats = {}
        for name in files:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                found = (self.path / name).stat()
                stats[name] = [found.st_size, found.st_mtime_ns]
        return stats

    def _found(self, recorded: Mapping[str, Any]) -> dict[str, str]:
        """The digests of a step's output as it is now: the recorded ones where size and time are as recorded."""
        outputs, before = recorded["outputs"], recorded["files"]
        stats = self._stats(outputs)
        changed = [name for name in stats if stats[name] != before.get(name)]
        hashed = dict(zip(changed, of_all(sha256, (self.path / name for name in changed)), strict=True))
        return {name: hashed.get(name, outputs[name]) for name in stats}

    def _allowed_changes(
        self, recorded: Mapping[str, Any], resolved: Mapping[str, Any], done: Collection[str]
    ) -> list[Change]:
        allowed, refused = changes(recorded, resolved, done)
        if refused:
            first = refused[0]
            key = first.key
            if has_key(recorded, key) != has_key(resolved, key):
                # A recorded recipe has every key of its version.
                has = "have" if has_key(recorded, key) else "do not have"
                raise UsageError(
                    f"the run in {self.path} was begun by another version of mla-convert, whose recipes {has} the key "
                    f"{key}; continue with that version or give another --out"
                )
            late = ", or change it with export, evaluate or generate on its checkpoint" if first.section in LATE else ""
            raise UsageError(
                f"the run in {self.path} has another recipe: {'; '.join(map(str, refused))}; give another --out{late}, "
                f"or continue with the recorded recipe: `mla-convert run --out {self.path} --resume`"
            )
        return allowed


def require_clips(path: Path, finished: Mapping[str, Any], found: Identity | None) -> None:
    """Raise UserError if one of the `finished` steps of the run in `path` recorded other clips than `found`."""
    for step in finished.values():
        recorded = step.get("clips") or found
        if recorded != found:
            raise UserError(f"the run in {path} was begun with other clips: {other_clips(recorded, found)}")


def read_state(path: Path, patience: float = 0.0) -> dict[str, Any]:
    """Read `state.json` of a run folder. Raises UserError if it is missing, unreadable or of another version.

    On NFS, another machine may briefly not see a file that was just replaced (ESTALE), so reading is retried for
    `patience` seconds.
    """
    end = time.monotonic() + patience
    try:
        while True:
            try:
                state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
                break
            except OSError:
                if time.monotonic() >= end:
                    raise
                time.sleep(_RETRY_SECONDS)
    except FileNotFoundError:
        raise UserError(f"{path} is not a run folder: it has no {STATE}") from None
    except (OSError, ValueError):
        raise UserError(f"{path / STATE} cannot be read; start again in another folder") from None
    if state.get("format") != FORMAT:
        raise UserError(f"{path / STATE} was written by another version of mla-convert; start again in another folder")
    return state
