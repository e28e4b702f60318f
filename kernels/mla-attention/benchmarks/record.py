"""What a run has found, in results.json and results.md, written at every change; a later process goes on from it."""

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
"""What two processes of one run have in common."""
TRIES = 3
"""Processes that one part may end."""


class Record:
    """The results of a run in the folder `out`.

    `first` says where and what. With `resume` the parts that an earlier process of the run finished stay, and what
    ended it is barred: by `NOW.barred` the variant, and the part itself where that is not known.
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
            lost.append({"why": "its process ended without a word", **running})
        NOW.barred = {one["name"]: f"{one['why']}, in {one['part']}" for one in lost if one["name"]}

    def done(self, part):
        """Whether a part needs no process any more: it has ended, or has ended too many of them."""
        lost = [one for one in self.result.get("lost", []) if one["part"] == part]
        if part not in self.result["seconds"] and (any(not one["name"] for one in lost) or len(lost) >= TRIES):
            found = self.result.get(part)
            failed = {**(found if isinstance(found, dict) else {}), "failed": "; ".join(one["why"] for one in lost)}
            self.result["seconds"][part] = 0.0
            self.save(part, failed)
        return part in self.result["seconds"]

    def save(self, part, found):
        """Write what a part has found so far."""
        with self.lock:
            self.result[part] = found
            self.result["goals"] = goals(self.result)
            self.write()

    def write(self):
        write(self.out / "results.json", json.dumps(self.result, indent=2) + "\n")
        write(self.out / "results.md", table(self.result))

    def measure(self, part, work, device, left, into=None):
        """The result of a part, saved as `into`, with the time it took; what it had saved before it failed stays.

        Ends the process with the code LOST where the device does not answer any more.
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
            # The other parts are worth having all the same.
            found = {**(self.result.get(into) or {}), "failed": told(error)}
            print(f"{part}: {found['failed']}", file=sys.stderr)
        with self.lock:
            self.result.pop("running", None)
            self.result["seconds"][part] = time.monotonic() - began
            self.save(into, found)
        return found

    def lost(self, why):
        """Note what ran and end the process: the device does not answer it, or what runs does not end."""
        with self.lock:
            running = self.result.pop("running", {"part": None})
            self.result.setdefault("lost", []).append({"part": running["part"], "name": NOW.name, "why": why})
            self.write()
        print(f"{running['part']}, {NOW.name}: {why}; run with --resume to go on", file=sys.stderr, flush=True)
        leave(LOST)


def leave(code):
    """End this process at once: nothing waits for a device that does not answer."""
    sys.stdout.flush()
    os._exit(code)


def write(path, text):
    """A file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
