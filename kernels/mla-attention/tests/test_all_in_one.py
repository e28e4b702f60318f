"""`all.sh`: order, time limits and exit code, with a fake interpreter that only prints its arguments."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "all.sh"


@pytest.fixture
def ran(tmp_path):
    def run(seconds="800", **given):
        """The process and its logs. MODELS and XDIST are the exit codes of imports, CODES those of run.py."""
        python, out = tmp_path / "python", tmp_path / "out"
        python.write_text(
            "#!/bin/sh\n"
            'case "$*" in *xdist*) exit $XDIST;; *import*) exit $MODELS;; *freeze*) exit 0;; esac\n'
            f'echo "$*" | tee -a {tmp_path}/order\n'
            f'case "$*" in *run.py*) exit $(echo $CODES | cut -d " " -f $(grep -c run.py {tmp_path}/order));; esac\n'
        )
        python.chmod(0o755)
        environment = {**os.environ, "PYTHON": str(python), "MODELS": "0", "XDIST": "1", "CODES": "0", **given}
        command = ["bash", str(SCRIPT), str(out), seconds, "--tiles", "tiles.json"]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return process, {log.name: log.read_text() for log in out.glob("*.txt")}, (tmp_path / "order").read_text()

    return run


@pytest.mark.parametrize(("models", "code"), [("0", "0"), ("1", "1")])
def test_the_benchmark_comes_before_the_tests(ran, models, code):
    process, told, order = ran(MODELS=models, CODES=code)
    assert process.returncode == int(code)
    assert "run.py" in order.splitlines()[0] and "tests/gpu/test_gpu_ops.py" in order.splitlines()[1]
    budget, *options = told["benchmark.txt"].split("--budget ")[1].split()
    assert options == ["--tiles", "tiles.json"]
    # A sixth is reserved for the tests of ops, an eighth for those of whole models.
    most = 800 - 15 - 133 - (100 if models == "0" else 0)
    assert int(budget) in range(most - 30, most + 1)
    assert ("test_models.txt" in told) == (models == "0") and "-n" not in told["test_ops.txt"].split()


def test_another_process_goes_on_where_one_was_lost(ran):
    process, told, order = ran(CODES="3 3 0")
    first, second, third, *_ = order.splitlines()
    assert "--resume" not in first and "--resume" in second and "--resume" in third
    assert told["benchmark.txt"].count("run.py") == 3 and process.returncode == 1


def test_tests_run_on_several_processes_where_they_can(ran):
    _, told, _ = ran(XDIST="0")
    assert "-n" in told["test_ops.txt"].split() and "-n" not in told["test_models.txt"].split()


def test_what_no_time_was_left_for_is_told(ran):
    process, told, _ = ran(seconds="24")
    assert process.returncode == 1 or "run.py" in told["benchmark.txt"]
