"""A stage small enough to train in seconds; run as a script, it is one process of a run."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import launched, start
from warm import Python

from mla_convert.cli import leave_processes
from mla_convert.convert import ConvertConfig, convert_model
from mla_convert.distill.data import Batch, DigitClips
from mla_convert.distill.metrics import Metrics
from mla_convert.distill.stages.base import StageConfig
from mla_convert.distill.trainer import StageResult, run_stage
from mla_convert.families.wan import FAMILY, CausalWanTransformer3DModel
from mla_convert.registry import stages

CAUSAL = {"num_frames_per_block": 3, "window_frames": 12, "sink_frames": 3}
HELDOUT_CLIPS = 2
IN_PARTS = {
    "adapters": {"trainable": "attention", "lora": {"rank": 2, "alpha": 2}, "gradient_checkpointing": True},
    "consistency": {"stage": "consistency", "teacher": "start", "trainable": "all", "steps": 5},
}
"""Stages that are trained with weights or optimizer in parts."""


def tiny_model(seed: int = 0, layers: int = 2) -> CausalWanTransformer3DModel:
    torch.manual_seed(seed)
    return CausalWanTransformer3DModel(
        patch_size=(1, 8, 8),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=1,
        out_channels=1,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
        causal=CAUSAL,
    )


def perturbed(teacher: CausalWanTransformer3DModel, scale: float = 0.1) -> CausalWanTransformer3DModel:
    """A second dense model whose self-attention differs slightly from the teacher's."""
    student = tiny_model()
    student.load_state_dict(teacher.state_dict())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "attn1" in name:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return student


def shared_latents(teacher: CausalWanTransformer3DModel, layers_per_latent: int) -> Any:
    """A converted model of random latents that `layers_per_latent` layers share; it shares no memory with `teacher`."""
    config = ConvertConfig(layers_per_latent=layers_per_latent, kv_lora_rank=24, init="random")
    return copy.deepcopy(convert_model(FAMILY, teacher, config, []))


def make_config(stage: str = "match_velocity", **changes) -> StageConfig:
    settings = {
        "steps": 8,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "schedule": "cosine",
        "batch_size": 2,
        "trainable": "attention",
        "ema_decay": 0.9,
        "checkpoint_every": 3,
        "eval_every": 4,
        "tracker": None,
    }
    return stages()[stage].config_class(**{**settings, **changes})


class Killed(Exception):
    """Stands in for SIGKILL where a separate process would be too slow."""


class Clips(DigitClips):
    """Digits whose clip after `last` ends the run."""

    def __init__(self, last: float = float("inf")) -> None:
        super().__init__(seed=0, heldout=HELDOUT_CLIPS)
        self.last = last

    def example(self, index: int) -> Batch:
        if index > self.last:
            raise Killed
        return super().example(index)


def train(folder: Path, last_clip: float = float("inf"), **changes) -> tuple[StageResult, dict[str, torch.Tensor]]:
    """Run the stage; returns its result and the student's weights.

    With `layers_per_latent`, the student is a converted model of two latents, else a dense one. `second_start` is the
    path of the second network's first weights.
    """
    shared, second_start = changes.pop("layers_per_latent", None), changes.pop("second_start", None)
    teacher = tiny_model(layers=2 if shared is None else 2 * shared)
    student = perturbed(teacher) if shared is None else shared_latents(teacher, shared)
    data = Clips(last_clip)
    result = run_stage(
        make_config(**changes),
        student,
        {"teacher": teacher},
        data,
        data.heldout(),
        folder,
        seed=0,
        stage_index=0,
        second_start=None if second_start is None else Path(second_start),
    )
    return result, student.state_dict()


def whole_and_resumed(root: Path, last_clip: float, **changes) -> dict[str, torch.Tensor]:
    """Weights of the stage in `root/whole`; an interrupted stage in `root/resumed` must end with the same ones."""
    _, whole = train(root / "whole", **changes)
    with contextlib.suppress(Killed):
        train(root / "resumed", last_clip, **changes)
    result, weights = train(root / "resumed", **changes)
    assert result.resumed_from == 3
    assert all(type(tensor) is torch.Tensor for tensor in weights.values())
    assert all(torch.equal(weights[name], tensor) for name, tensor in whole.items())
    if os.environ.get("RANK", "0") == "0":
        torch.save(whole, root / "weights.pt")
    return weights


def trained_by_two(folder: Path, script: str, settings: dict[str, dict]) -> Path:
    """Run every stage of `settings` whole and resumed, by a script's `main` in two processes that are started once."""
    two_processes(folder, 15, script=script, **settings)
    return folder


def equal_checkpoints(root: Path) -> list[Path]:
    """The newest checkpoints of `whole` and `resumed` in `root`, after checking that their metrics are the same."""
    whole, resumed = (root / folder for folder in ("whole", "resumed"))
    assert (whole / "metrics.jsonl").read_bytes() == (resumed / "metrics.jsonl").read_bytes()
    newest = max((whole / "checkpoints").iterdir())
    return [newest, resumed / newest.relative_to(whole)]


def assert_as_one_process(root: Path, folder: Path, tolerance: float, rel: float = 1e-3, **changes) -> None:
    """Assert that the `whole_and_resumed` stage in `root` (two processes) equals one of one process in `folder`.

    Weights differ by less than `tolerance`, metrics by the share `rel`.
    """
    _, expected = train(folder, **{**changes, "grad_accumulation": 2 * changes.get("grad_accumulation", 1)})
    weights = torch.load(root / "weights.pt")
    assert list(weights) == list(expected)
    assert max((weights[name] - tensor).abs().max().item() for name, tensor in expected.items()) < tolerance
    one, two = (Metrics(path / "metrics.jsonl").rows() for path in (folder, root / "whole"))
    for key in ("loss", "grad_norm", "ema_distance", "heldout_loss", "heldout_ratio"):
        values = [[row[key] for row in rows if key in row] for rows in (one, two)]
        assert values[1] == pytest.approx(values[0], rel=rel, abs=1e-6)


def outputs(folder: Path) -> dict[str, bytes]:
    """Everything that a resumed run must reproduce, by relative path."""
    paths = [folder / "metrics.jsonl", *(folder / "checkpoints").rglob("*.*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(paths)}


def environment() -> dict[str, str]:
    """The environment of a separate process."""
    root = Path(__file__).parents[1]
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(root)}


def two_processes(folder: Path, last_clip: float, script: str = __file__, **changes) -> list[str]:
    """Run `main` of this file or another in two processes that train together; returns what they printed."""
    done = launched(2, script, str(folder), str(last_clip), json.dumps(changes))
    assert [one.code for one in done] == [0, 0], [one.err for one in done]
    return [one.out for one in done]


def stop_two_processes(folder: Path, step: int, **changes) -> int:
    """Run `main` in two processes; the second gets SIGUSR1 after a row of `step`. Returns the launcher's exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [__file__, str(folder), "inf", json.dumps(changes)]
    with subprocess.Popen(command, env=environment(), start_new_session=True) as launcher:
        try:
            _wait_for_row(folder, step, [launcher])
            os.kill(int((folder / "pid-1").read_text()), signal.SIGUSR1)
            launcher.communicate(timeout=300)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
    return launcher.returncode


def _wait_for_row(folder: Path, step: int, processes: Sequence[subprocess.Popen[bytes] | Python]) -> None:
    """Wait until `folder/whole`, in which `processes` train, has a row of `step`."""
    metrics, deadline = folder / "whole" / "metrics.jsonl", time.monotonic() + 300
    while not metrics.exists() or metrics.read_bytes().count(b"\n") <= step:
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < deadline
        time.sleep(0.001)


def kill_at_row(folder: Path, step: int, processes: Sequence[Python]) -> None:
    """Kill `processes` of `main` with SIGKILL as soon as `folder/whole` has a row of `step`."""
    try:
        _wait_for_row(folder, step, processes)
    finally:
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        for process in processes:
            process.kill()


def kill_two_processes(folder: Path, step: int, **changes) -> None:
    """Run `main` in two processes and kill both with SIGKILL as soon as `folder/whole` has a row of `step`."""
    kill_at_row(folder, step, start(2, __file__, str(folder), "inf", json.dumps(changes)))


def main(folder: str, last_clip: str, changes: str) -> None:
    """Train in `folder/whole`, and in `folder/resumed` with an interruption after clip `last_clip`."""
    Path(folder, f"pid-{os.environ.get('RANK', '0')}").write_text(str(os.getpid()))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    train(Path(folder, "whole"), **json.loads(changes))
    with contextlib.suppress(Killed):
        train(Path(folder, "resumed"), float(last_clip), **json.loads(changes))
    result, _ = train(Path(folder, "resumed"), **json.loads(changes))
    print(f"resumed from {result.resumed_from}")


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_processes()
