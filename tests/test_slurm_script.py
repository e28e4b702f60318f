"""The Slurm script of docs/distill.md, run by bash with stand-ins: what it launches, and when it asks for a requeue."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mla_convert.pipeline.rundir import STOPPED

PAGE = Path(__file__).parents[1] / "docs" / "distill.md"
# srun starts its command once on every machine; its own code is the highest one.
SRUN = """
while [[ $1 == --* ]]; do shift; done
code=0
for SLURM_NODEID in 0 1; do
    export SLURM_NODEID
    "$@" || code=1
done
[ -z "$TERM_TO_BATCH" ] || kill -TERM $PPID
exit $code
"""
SCONTROL = """
if [ "$1" = show ]; then printf 'node-1\\nnode-2\\n'; else echo "$@" >> "$RECORD/scontrol"; fi
"""
ACCELERATE = """
printf '%s\\n' "$*" >> "$RECORD/accelerate"
trap -p USR1 >> "$RECORD/traps"
[ -z "$STOPS" ] || touch "$run/NAME"
exit $CODE
"""


@pytest.fixture
def batch(tmp_path):
    """Runs the script with environment variables; returns its exit code and the calls of `scontrol requeue`."""
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH .*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    run, tools = tmp_path / "run", tmp_path / "bin"
    run.mkdir()
    tools.mkdir()
    assert "run=/shared/runs/paper\n" in script
    (tmp_path / "job.sh").write_text(script.replace("/shared/runs/paper", str(run)))
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("accelerate", ACCELERATE.replace("NAME", STOPPED))):
        (tools / name).write_text(f"#!/bin/bash\n{text}")
        (tools / name).chmod(0o755)

    def start(**variables):
        environment = {
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "RECORD": str(tmp_path),
            "SLURM_JOB_ID": "42",
            "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "node-[1-2]",
            **variables,
        }
        done = subprocess.run(["bash", str(tmp_path / "job.sh")], env=environment, timeout=60)
        calls = tmp_path / "scontrol"
        return done.returncode, calls.read_text().splitlines() if calls.exists() else []

    return start


def test_every_machine_launches_its_processes(batch, tmp_path):
    assert batch(CODE="0") == (0, [])
    lines = (tmp_path / "accelerate").read_text().splitlines()
    for rank, line in enumerate(lines):
        assert line.startswith("launch --config_file recipes/accelerate/machines.yaml --num_machines 2 ")
        assert f"--num_processes 16 --machine_rank {rank} --main_process_ip node-1 " in line
        assert line.endswith(f"-m mla_convert distill wan2.1-1.3b-paper --out {tmp_path / 'run'} --resume")
    assert len(lines) == 2
    # The launchers ignore what the processes of the stage act on.
    assert (tmp_path / "traps").read_text() == "trap -- '' SIGUSR1\n" * 2


@pytest.mark.parametrize("signaled", ["", "yes"])
def test_a_run_that_a_signal_stopped_is_queued_again(batch, signaled):
    assert batch(CODE="1", STOPS="yes", TERM_TO_BATCH=signaled) == (1, ["requeue 42"])


def test_a_run_that_failed_is_not_queued_again(batch, tmp_path):
    """Also if it was stopped before, and failed so early that it has not removed the mark itself."""
    (tmp_path / "run" / STOPPED).touch()
    assert batch(CODE="1") == (1, [])
