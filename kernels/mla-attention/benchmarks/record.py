"""Keep the results of a run in results.json and results.md, rewritten on every change; a later process resumes them."""

from __future__ import annotations

import json
import os
import sys
import threading
import time

import torch
from report import goals, table
from timing import told
from watch import LOST, NOW, Lost, mark, require_answer

SAME = ("device", "torch", "triton", "tiny", "dtype", "shape")
"""What must be equal in two processes of one run."""
TRIES = 3
"""Number of lost processes after which a part is abandoned."""


class Record:
    """The results of a run in the folder `out`.

    `first` describes the device and the sizes. With `resume`, the parts that an earlier process of the run finished are
    kept, and what ended that process is not run again: the variant (`NOW.barred`), or the whole part if the variant is
    unknown.
    """

    def __init__(self, out, first, resume=False):
        self.out, self.lock, self.result = out, threading.RLock(), {"seconds": {}, **first}
        out.mkdir(parents=True, exist_ok=True)
        path = out / "results.json"
        if resume and path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
            if all(old.get(key) == first.get(key) for key in SAME):
                self.result = old
        lost = self.result.get("lost", [])
        if running := self.result.pop("running", None):
            lost = self.result.setdefault("lost", [])
            lost.append({"why": "its process ended without an error message", **running})
        NOW.barred = {one["name"]: f"{one['why']}, in {one['part']}" for one in lost if one["name"]}

    def done(self, part):
        """Whether a part is finished, or was abandoned because it lost too many processes."""
        lost = [one for one in self.result.get("lost", []) if one["part"] == part]
        if part not in self.result["seconds"] and (any(not one["name"] for one in lost) or len(lost) >= TRIES):
            found = self.result.get(part)
            failed = {**(found if isinstance(found, dict) else {}), "failed": "; ".join(one["why"] for one in lost)}
            self.result["seconds"][part] = 0.0
            self.save(part, failed)
        return part in self.result["seconds"]

    def save(self, part, found):
        """Save what a part has found so far."""
        with self.lock:
            self.result[part] = found
            self.result["goals"] = goals(self.result)
            self.write()

    def write(self):
        write(self.out / "results.json", json.dumps(self.result, indent=2) + "\n")
        write(self.out / "results.md", table(self.result))

    def measure(self, part, work, device, left, into=None):
        """Run a part and return its result, saved as `into` with its duration; a failure keeps what was already saved.

        Exits with the code LOST if the device stops responding.
        """
        into = into or part
        print(f"{part}: {left:.0f} s left", file=sys.stderr)
        began = time.monotonic()
        with self.lock:
            NOW.name = None
            mark()
            self.result["running"] = {"part": part, "name": None}
            self.write()
        try:
            found = work()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        except Lost as error:
            self.lost(str(error))
        except Exception as error:
            try:
                require_answer(device, error)
            except Lost:
                self.lost(told(error))
            # Continue: the other parts are still worth measuring.
            found = {**(self.result.get(into) or {}), "failed": told(error)}
            print(f"{part}: {found['failed']}", file=sys.stderr)
        with self.lock:
            self.result.pop("running", None)
            self.result["seconds"][part] = time.monotonic() - began
            self.save(into, found)
        return found

    def lost(self, why):
        """Record the call that lost the device or hangs, and exit with the code LOST."""
        with self.lock:
            running = self.result.pop("running", {"part": None})
            self.result.setdefault("lost", []).append({"part": running["part"], "name": NOW.name, "why": why})
            self.write()
        print(f"{running['part']}, {NOW.name}: {why}; run with --resume to continue", file=sys.stderr, flush=True)
        leave(LOST)


def leave(code):
    """Exit at once, without waiting for a device that does not respond."""
    sys.stdout.flush()
    os._exit(code)


def write(path, text):
    """Write a file atomically."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
