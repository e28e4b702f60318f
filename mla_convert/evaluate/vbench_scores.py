"""Runs the user's VBench in its own environment and reads its results.

This follows VBench's repository at 0.1.5: `evaluate.py` and `static_filter.py` for short videos, and
`vbench2_beta_long/eval_long.py` for VBench-Long, which cuts videos into clips itself.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .vbench_suite import DIMENSIONS, FLICKERING, INFO

SHORT, FILTER, LONG = "evaluate.py", "static_filter.py", "vbench2_beta_long/eval_long.py"
CONSTANTS = "scripts/constant.py"
RESULTS, LOG = "*_eval_results.json", "log.txt"


@dataclass(frozen=True)
class Judge:
    """A checkout of VBench with its environment's Python; `long` selects VBench-Long, with `samples` per prompt."""

    checkout: Path
    python: str
    long: bool
    samples: int

    def check(self) -> None:
        """Raise UserError if a program is missing; call this before hours of video generation."""
        if shutil.which(self.python) is None:
            raise UserError(f"{self.python} is not a program; give the Python of VBench's own environment")
        for script in (LONG,) if self.long else (SHORT, FILTER):
            if not (self.checkout / script).is_file():
                raise UserError(f"{self.checkout} is not a checkout of VBench; it has no {script}")

    def score(self, dimension: str, videos: Path, out: Path) -> float:
        """VBench's score of the videos in a folder; `out` gets results and log. Raises UserError in one line."""
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        common = ["--dimension", dimension, "--output_path", str(out)]
        if self.long:
            filtered = ["--static_filter_flag"] if dimension == FLICKERING else []
            samples = ["--num_of_samples_per_prompt", str(self.samples)]
            mode = ["--mode", "long_vbench_standard", "--dev_flag"]
            self._run([LONG, "--videos_path", str(videos), *common, *mode, *samples, *filtered], dimension, out)
        else:
            if dimension == FLICKERING:
                self._run([FILTER, "--videos_path", str(videos), "--result_path", str(out)], dimension, out)
                videos = out / "filtered_videos"
            info = ["--full_json_dir", str(self.checkout / INFO)]
            self._run([SHORT, "--videos_path", str(videos), *common, *info], dimension, out)
        return read_score(out, dimension)

    def _run(self, command: Sequence[str], dimension: str, out: Path) -> None:
        log = out / LOG
        with log.open("a", encoding="utf-8") as handle:
            handle.write(f"$ {' '.join([self.python, *command])}\n")
            handle.flush()
            code = subprocess.run(
                [self.python, *command], cwd=self.checkout, stdout=handle, stderr=subprocess.STDOUT, check=False
            ).returncode
        if code:
            lines = log.read_text(errors="replace", encoding="utf-8").strip().splitlines()
            raise UserError(f"VBench failed on {dimension} (exit code {code}): {lines[-1].strip()}; see {log}")


def read_score(out: Path, dimension: str) -> float:
    """A dimension's score from VBench's newest result in a folder, `{dimension: [score, details]}`."""
    found = sorted(out.glob(RESULTS))
    if not found:
        raise UserError(f"VBench wrote no {RESULTS} for {dimension}; see {out / LOG}")
    try:
        value = json.loads(found[-1].read_text(encoding="utf-8"))[dimension]
        return float(value[0] if isinstance(value, list) else value)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise UserError(f"{found[-1]} has no score for {dimension}; see {out / LOG}") from None


def version(checkout: Path) -> str:
    """The version in the checkout's setup.py, or "unknown"."""
    try:
        found = re.search(r"version\s*=\s*['\"]([^'\"]+)", (checkout / "setup.py").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else "unknown"


def totals(checkout: Path, scores: Mapping[str, float]) -> dict[str, float]:
    """VBench's quality, semantic and total score, with the ranges and weights of `scripts/constant.py`.

    A score with a missing dimension is left out, whereas VBench's own script counts a missing dimension as 0.
    """
    constants = _constants(checkout / CONSTANTS)
    if not constants:
        return {}
    ranges, weights = constants["NORMALIZE_DIC"], constants["DIM_WEIGHT"]
    by_name = {name.replace("_", " "): value for name, value in scores.items()}

    def mean(names: Sequence[str]) -> float | None:
        if not set(names) <= set(by_name):
            return None
        total = 0.0
        for name in names:
            low, high = ranges[name]["Min"], ranges[name]["Max"]
            total += weights[name] * (by_name[name] - low) / (high - low)
        return total / sum(weights[name] for name in names)

    quality, semantic = mean(constants["QUALITY_LIST"]), mean(constants["SEMANTIC_LIST"])
    found = {name: value for name, value in (("quality", quality), ("semantic", semantic)) if value is not None}
    if quality is not None and semantic is not None:
        parts = constants["QUALITY_WEIGHT"], constants["SEMANTIC_WEIGHT"]
        found["total"] = (quality * parts[0] + semantic * parts[1]) / sum(parts)
    return found


def _constants(path: Path) -> dict[str, Any]:
    """Read the constants of VBench's script without running it; {} if the script is not as expected."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
    except (OSError, ValueError, SyntaxError):
        return {}
    needed = ("NORMALIZE_DIC", "DIM_WEIGHT", "QUALITY_LIST", "SEMANTIC_LIST", "QUALITY_WEIGHT", "SEMANTIC_WEIGHT")
    return found if all(name in found for name in needed) else {}


def read_published(path: Path) -> dict[str, dict[str, float]]:
    """Read published values to compare with: `{name: {dimension, quality, semantic or total: value}}`.

    Raises UserError.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        table = {str(name): {str(key): float(value) for key, value in row.items()} for name, row in found.items()}
    except OSError as error:
        raise UserError(f"cannot read published values from {path}: {error}") from None
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{path} must be JSON of the form {{name: {{dimension: value}}}}") from None
    known = {*DIMENSIONS, "quality", "semantic", "total"}
    if unknown := [key for row in table.values() for key in row if key not in known]:
        raise UserError(f"{path}: VBench has no dimension {unknown[0]}; it has {', '.join(sorted(known))}")
    return table
