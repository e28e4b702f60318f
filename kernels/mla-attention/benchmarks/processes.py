"""Run commands in separate processes, so that one that fails or hangs affects neither the others nor this process."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import time

from watch import mark

TIME_ENDED = "time ended"


def together(commands, workers, budget, environment=None):
    """Run `commands`, `{key: arguments}`; returns by key the JSON in the last line of output, or an error message.

    At most `workers` run at once. Commands that have not finished when `budget` ends are killed: `TIME_ENDED`.
    """
    found, running, waiting = {}, {}, dict(commands)
    while waiting or running:
        # This process waits but does not hang.
        mark()
        while waiting and len(running) < workers and budget.left() > 0:
            key = next(iter(waiting))
            # Use files: a failing compiler prints more than a pipe holds.
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
                found[key] = (lines[-1] if lines else "it ended without an error message")[:200]
        if ended:
            found.update((key, TIME_ENDED) for key in (*waiting, *running))
            for process, _ in running.values():
                process.kill()
            for process, _ in running.values():
                # It must not share the device with later timing, but do not wait for one that is stuck in the driver.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
            return found
        time.sleep(0.02)
    return found


def read(output):
    """Read the output of a process from a temporary file and close it."""
    with output:
        output.seek(0)
        return output.read()
