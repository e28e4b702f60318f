"""What is chosen and said on hardware that is not here: older GPUs, several kinds of them, Apple's, none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distill_case
import pico
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from mla_convert import devices
from mla_convert.cli import main
from mla_convert.errors import UsageError
from mla_convert.evaluate.bench import BenchConfig, _place
from mla_convert.export.checkpoint import save_checkpoint
from mla_convert.pipeline import fits
from mla_convert.pipeline.run import this_process

GPU = torch.device("cuda")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says which GPUs there are, by capability and bytes of memory."""

    def there_are(*cards: tuple[tuple[int, int], int]) -> None:
        index = lambda device: torch.device(device).index or 0  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cards))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {index(device)}")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: cards[index(device)][0])
        properties = lambda device: SimpleNamespace(total_memory=cards[index(device)][1])  # noqa: E731
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)

    return there_are


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Mac, on which Accelerate would take MPS, in a new process."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(PartialState, "default_device", torch.device("mps"))
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_mac_trains_on_the_cpu_as_all_else_runs_there(apple: Any, tmp_path: Path) -> None:
    assert PartialState().device.type == "mps"
    PartialState._reset_state()
    assert devices.default_device().type == this_process().device.type == "cpu"
    PartialState._reset_state()
    # Without a pipeline around it, too.
    distill_case.train(tmp_path, steps=1)
    assert PartialState().device.type == "cpu"


def test_cores_are_counted_where_the_system_has_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    before = torch.get_num_threads()
    with devices.all_threads():
        assert torch.get_num_threads() == max(3, before)
    assert torch.get_num_threads() == before


def test_float64_is_left_out_where_there_is_none() -> None:
    assert [devices.widest(torch.device(name)) for name in ("mps", "cuda", "cpu")] == [
        torch.float32,
        torch.float64,
        torch.float64,
    ]


def test_bench_takes_a_device_that_is_there(gpus: Any) -> None:
    gpus(((9, 0), 80))
    for name in ("cuda", "cuda:0"):
        assert _place(BenchConfig(device=name)) == (torch.device(name), torch.bfloat16)
    for name in ("mps", "xpu", "meta", "quantum"):
        with pytest.raises(UsageError, match=f"unknown device '{name}'; use cpu, cuda or cuda:1"):
            _place(BenchConfig(device=name))
    with pytest.raises(UsageError, match="there is no cuda:7; this machine has 1 GPU, from cuda:0 on"):
        _place(BenchConfig(device="cuda:7"))


def test_an_older_gpu_is_measured_in_float16(gpus: Any) -> None:
    gpus(((7, 5), 16))
    assert _place(BenchConfig()) == (GPU, torch.float16)
    assert _place(BenchConfig(dtype="bfloat16")) == (GPU, torch.bfloat16)


def test_bfloat16_on_an_older_gpu_is_said_before_anything_is_loaded(
    gpus: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, dtype in (("half", torch.bfloat16), ("whole", torch.float32)):
        save_checkpoint(pico.dense_model().to(dtype), tmp_path / name, {})
    for card, folder, asked, said in (
        ((7, 5), "half", None, True),
        ((7, 5), "whole", "bfloat16", True),
        ((7, 5), "half", "float16", False),
        ((7, 5), "whole", None, False),
        ((8, 9), "half", None, False),
    ):
        gpus((card, 16))
        caplog.clear()
        fits.warn_of_bfloat16(tmp_path / folder, asked, GPU)
        assert [message for message in caplog.messages if "GPU 0 has no fused attention in bfloat16" in message] == (
            caplog.messages if said else []
        )
        assert len(caplog.messages) == said
    assert not devices.lacks_bfloat16(torch.device("cpu"))


def test_the_smallest_gpu_of_a_launch_decides(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(((9, 0), 80), ((8, 9), 24), ((8, 9), 12))
    assert fits.least_memory(GPU) == 80
    # The third takes no part.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert fits.least_memory(GPU) == 24


def test_triton_is_no_dependency() -> None:
    """A ROCm build of torch brings that module under another name, which ours would overwrite."""
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    needed, _, developers = text.partition("[project.optional-dependencies]")
    assert '"triton' not in needed and '"triton' in developers


def test_windows_is_told_where_the_command_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    assert main(["recipes", "list"]) == 1
    line = "error: mla-convert runs on Linux and macOS; on Windows use WSL2\n"
    assert capsys.readouterr() == ("", line)
