"""Commands in processes of their own: one that fails or hangs ends no other, and not the process that measures."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import time

from watch import mark

TIME_ENDED = "time ended"


def together(commands, workers, budget, environment=None):
    """By key what each of `commands`, `{key: arguments}`, printed as JSON in its last line, else why not, in words.

    `workers` of them run at once. Where `budget` ends those that have not are killed: `TIME_ENDED`.
    """
    found, running, waiting = {}, {}, dict(commands)
    while waiting or running:
        # The process that waits here does not hang.
        mark()
        while waiting and len(running) < workers and budget.left() > 0:
            key = next(iter(waiting))
            # Files, not pipes: a compiler that fails prints more than a pipe holds.
            outputs = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
            process = subprocess.Popen(waiting.pop(key), stdout=outputs[0], stderr=outputs[1], env=environment)
            running[key] = process, outputs
        ended = budget.left() <= 0
        for key in [key for key, (process, _) in running.items() if process.poll() is not None]:
            out, error = (read(output) for output in running.pop(key)[1])
            try:
                found[key] = json.loads(out.splitlines()[-1])
            except (IndexError, ValueError):
                lines = error.strip().splitlines()
                found[key] = (lines[-1] if lines else "it ended without a word")[:200]
        if ended:
            found.update((key, TIME_ENDED) for key in (*waiting, *running))
            for process, _ in running.values():
                process.kill()
            for process, _ in running.values():
                # What is timed next must not share the device; a process that its driver holds is not waited for.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
            return found
        time.sleep(0.02)
    return found


def read(output):
    """What a process wrote to a temporary file, which is closed."""
    with output:
        output.seek(0)
        return output.read()
