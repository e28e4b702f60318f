"""Export over an older export, killed before every file system operation in turn.

`python killed_export.py OLD NEW OUT EXCHANGE` prints the state of OUT after each kill, as JSON: `old`, `new`,
or `missing` where the next export restores it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copymode"}
OLD, NEW, OUT = (Path(argument) for argument in sys.argv[1:4])


def export_checkpoint(source: Path) -> None:
    export(source, OUT, ExportConfig(components="none"))


def contents() -> dict[str, bytes] | None:
    if not OUT.exists():
        return None
    return {str(path.relative_to(OUT)): path.read_bytes() for path in OUT.rglob("*") if path.is_file()}


def kill_before(step: int) -> bool:
    """Export in a child that is killed before operation `step`; returns whether there was one."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            writes = event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]
            if (event in EVENTS or writes) and str(OUT.parent) in str(arguments[0]):
                if seen == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        sys.addaudithook(hook)
        export_checkpoint(NEW)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


if __name__ == "__main__":
    import torch

    from mla_convert import files
    from mla_convert.export.config import ExportConfig
    from mla_convert.export.release import export

    torch.set_num_threads(1)
    if sys.argv[4] == "False":
        files._exchange = lambda one, other: False
    export_checkpoint(NEW)
    new = contents()
    shutil.rmtree(OUT)
    export_checkpoint(OLD)
    old = contents()
    assert old != new

    states: list[str] = []
    while kill_before(len(states)):
        found = contents()
        if found is None:
            # The next export of anything brings it back before it starts its own.
            with files.atomic_folder(OUT):
                found = contents()
                assert found == old
                states.append("missing")
                shutil.copytree(OUT, OUT.with_name("kept"))
            shutil.rmtree(OUT)
            OUT.with_name("kept").rename(OUT)
            continue
        assert found in (old, new), sorted(found)
        states.append("old" if found == old else "new")
        if found == new:
            export_checkpoint(OLD)
    assert contents() == new
    # What killed exports left beside it is gone.
    assert not [path for path in OUT.parent.iterdir() if path.name.endswith(".tmp")]
    json.dump(states, sys.stdout)
