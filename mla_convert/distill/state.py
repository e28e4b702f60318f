"""Writes and finds the checkpoints of a running stage, atomically; what they hold of a network is the learner's."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError
from ..files import atomic_folder, discard_folder, write_json
from .identity import other_clips
from .metrics import Row

OPTIMIZER, STATE = "optimizer.pt", "state.json"
FULL_BELOW = 1 << 20


@dataclass(frozen=True)
class Place:
    """Where a checkpoint has a trained network: the file of its weights, or the folder of its shards.

    `optimizer` is the optimizer's key in the file `OPTIMIZER`.
    """

    weights: str
    shards: str
    optimizer: str


STUDENT = Place("student.safetensors", "shards", "optimizer")
SECOND = Place("second.safetensors", "second-shards", "second")


Owed = Literal["heldout", "preview"]
"""What a stopped stage left out after its last step: the held-out loss and all that follows, or the preview alone."""


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint has in `STATE`: the row of the last step, the plain values of the stage's `Watch`, and `owed`.

    With `owed: heldout`, the row has no held-out loss yet and is not in the metrics.
    """

    row: Row
    watch: dict[str, Any]
    owed: Owed | None = None


class Checkpoints:
    """The newest `keep` checkpoints of one stage in `folder`, named `step-00000100` and so on.

    `identity` has everything that the result depends on; a checkpoint with another identity is refused. What cannot be
    deleted at once is tried again after the next checkpoint.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._unwanted: set[Path] = set()
        self.identity = json.loads(json.dumps(identity))

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def newest(self) -> Path | None:
        """The newest complete checkpoint. Raises UserError if it has another identity."""
        for path in reversed(self._all()):
            state = _read_state(path)
            if state is None:
                continue
            self._require_own(path, state["identity"])
            return path
        return None

    def _require_own(self, path: Path, recorded: dict[str, Any]) -> None:
        """Raise UserError if the identity `recorded` in a checkpoint is not `self.identity`."""
        for key, value in self.identity.items():
            before = recorded.get(key)
            if before == value:
                continue
            if key == "data":
                raise UserError(f"{path} was trained on other clips: {other_clips(before, value)}")
            remedy = f"start in another folder or remove {self.folder}"
            if key == "start":
                raise UserError(f"{path} began with other weights than the steps before it have left now; {remedy}")
            if key == "processes":
                remedy = f"launch as many processes as before (only global_batch allows another number), or {remedy}"
            raise UserError(f"{path} was made with {key} {before}, not {value}; {remedy}")

    def discard_broken(self) -> None:
        """Remove incomplete checkpoints that a killed run left."""
        self._discard(path for path in self._all() if _read_state(path) is None)

    def _discard(self, paths: Iterable[Path]) -> None:
        """Delete `paths`, earlier ones of which something is left, and what killed runs left half-written."""
        unwanted = self._unwanted | {*paths, *self.folder.glob(".*.tmp")}
        self._unwanted = {path for path in sorted(unwanted) if not discard_folder(path)}

    def save(self, state: TrainingState, write: Callable[[Path], None]) -> None:
        """Write one checkpoint, then remove all but the newest `keep`. Raises UserError if the disk is full.

        `write` puts everything but `state` into the temporary folder that it is called with.
        """
        step = state.row["step"]
        place = self.folder / f"step-{step:08d}"
        with atomic_folder(place) as folder:
            with _full_disk_as_os_error(folder):
                write(folder)
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
            value = {"step": step, "row": state.row, "identity": self.identity, "watch": state.watch}
            owed = {} if state.owed is None else {"owed": state.owed}
            write_json(folder / STATE, {**value, **owed, "sizes": sizes})
        self._unwanted.discard(place)
        # A broken checkpoint that cannot be deleted must not take the place of a good one.
        kept = [path for path in self._all() if path not in self._unwanted]
        self._discard(kept[: -self.keep])


def read_checkpoint(path: Path) -> TrainingState:
    """Read the `TrainingState` of a complete checkpoint."""
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    return TrainingState(state["row"], state["watch"], state.get("owed"))


def read_optimizer(path: Path) -> dict[str, Any]:
    """Read an optimizer state to the CPU."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors on any device to `path`, by name."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


@torch.no_grad()
def read_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read in place what `write_weights` wrote of `tensors`."""
    stored = load_file(path)
    for name, tensor in tensors.items():
        tensor.copy_(stored[name])


def _read_state(path: Path) -> dict[str, Any] | None:
    """The content of a checkpoint's `state.json`; None if a file is missing or truncated."""
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
        complete = all((path / name).stat().st_size == size for name, size in state["sizes"].items())
    except (OSError, ValueError, KeyError):
        return None
    return state if complete else None


@contextlib.contextmanager
def _full_disk_as_os_error(folder: Path) -> Iterator[None]:
    """Raise a full disk as OSError with ENOSPC; safetensors and torch report it without an error number."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if shutil.disk_usage(folder).free < FULL_BELOW or "No space left" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device", str(folder)) from error
        raise
