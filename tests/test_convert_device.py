"""A conversion computes in the stored dtype on a GPU, and in float32 on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from pretend_gpu import GPU, pretended
from torch import Tensor

from mla_convert.convert import ConvertConfig, convert_model, convert_source, initialize
from mla_convert.export.checkpoint import load_checkpoint, save_checkpoint
from mla_convert.families.wan import FAMILY
from mla_convert.load import Source, load_dense, load_source

# Observed at most 3e-7, where eigenvalues at the cut are close 6e-4.
LIKE = 2e-3
CALIBRATION = {"clips": 8, "batch_size": 4, "queries_per_chunk": 8}
SHARED = {"position": "rotate_on_read", "own_chunk": "exact", "layers_per_latent": 2, "kv_lora_rank": 20}
CASES: dict[str, dict[str, Any]] = {
    **{f"{v['position']}-{v['own_chunk']}": dict(v) for v in pico.VARIANTS[::3]},
    "shared": SHARED,
    "few-tokens": {**SHARED, "calibration": {**CALIBRATION, "max_tokens": 60}},
    "factorized-query": {"kv_lora_rank": 9, "q_lora_rank": 12},
    "svd": {"init": "svd", "kv_lora_rank": 9},
    "random": {"init": "random", "kv_lora_rank": 9},
    "output": {"kv_lora_rank": 9, "calibration": {**CALIBRATION, "metric": "output", "hidden_states": "converted"}},
    "budget": {"budget": {"reduction": 0.6, "rank_multiple": 4}},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("dense")
    pico.dense_model().save_pretrained(folder)
    return load_source(str(folder))


def converted(source: Source, folder: Path, device: torch.device | str, **settings: Any) -> dict[str, Tensor]:
    """The state of a conversion, read from its files."""
    config = ConvertConfig(**{"calibration": CALIBRATION, **settings})
    found = convert_source(source, config, folder / "parts", pico.batches(), device=device)
    save_checkpoint(found.model, folder / "checkpoint", {}, tensors=found.tensors)
    return dict(load_checkpoint(folder / "checkpoint").state_dict())


def velocity_error(folder: Path) -> float:
    """Relative difference between the velocities of the models in `folder` from `gpu` and `cpu`."""
    clip = pico.inputs(2, 7, 6, 4)
    actual, expected = (load_checkpoint(folder / name / "checkpoint")(*clip).sample for name in ("gpu", "cpu"))
    return pico.relative_error(actual, expected)


@pytest.mark.parametrize("case", CASES)
def test_a_conversion_on_a_gpu_is_that_on_a_cpu(source: Source, tmp_path: Path, case: str) -> None:
    converted(source, tmp_path / "cpu", "cpu", **CASES[case])
    with pretended():
        converted(source, tmp_path / "gpu", GPU, **CASES[case])
    assert velocity_error(tmp_path) < LIKE


def test_layers_that_a_cpu_fitted_are_fitted_again_on_a_gpu(source: Source, tmp_path: Path) -> None:
    """There activations may have another dtype, and one model must not mix the two."""
    fitted: list[Any] = []
    config = ConvertConfig(**CASES["svd"])
    for device, expected in (("cpu", 2), (GPU, 4), (torch.device("cuda", 0), 4)):
        with pretended():
            convert_source(source, config, tmp_path, progress=lambda *told: fitted.append(told), device=device)
        assert len(fitted) == expected


def test_a_model_on_a_gpu_is_converted_there() -> None:
    dense, config = pico.dense_model(), ConvertConfig(kv_lora_rank=9, calibration=CALIBRATION)
    clip = pico.inputs(2, 7, 6, 4)
    expected = convert_model(FAMILY, dense, config, pico.batches())(*clip).sample
    with pretended(), torch.no_grad():
        model = convert_model(FAMILY, dense.to(GPU), config, pico.batches())
        assert {tensor.device for tensor in model.state_dict().values()} == {GPU}
        actual = model(*(x.to(GPU) for x in clip)).sample.cpu()
    assert pico.relative_error(actual, expected) < LIKE


def test_what_does_not_fit_on_a_gpu_is_fitted_on_the_cpu(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fit_read = initialize._fit_read

    def full(read: Any, rank: int, device: torch.device, ridge: float) -> Any:
        if device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory\nand more")
        return fit_read(read, rank, device, ridge)

    converted(source, tmp_path / "cpu", "cpu", **SHARED)
    monkeypatch.setattr(initialize, "_fit_read", full)
    with pretended():
        converted(source, tmp_path / "gpu", GPU, **SHARED)
    assert "cuda:0 cannot fit 96 numbers per token; using the CPU: CUDA out of memory" in caplog.text
    assert velocity_error(tmp_path) < LIKE


@pytest.mark.parametrize("case", ["shared", "output", "budget"])
def test_half_precision_is_calibrated_in_float32_on_a_cpu(source: Source, tmp_path: Path, case: str) -> None:
    load_dense(source).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    half = load_source(str(tmp_path / "half"))
    load_dense(half, torch.float32).save_pretrained(tmp_path / "whole")
    actual = converted(half, tmp_path / "a", "cpu", **CASES[case])
    expected = converted(load_source(str(tmp_path / "whole")), tmp_path / "b", "cpu", **CASES[case])
    assert {tensor.dtype for tensor in actual.values()} == {torch.bfloat16}
    if case != "output":
        assert all(torch.equal(actual[name], tensor.to(torch.bfloat16)) for name, tensor in expected.items())
    # Layers above a converted one see what its stored projections make.
    first = [name for name in expected if name.startswith("blocks.0.")]
    assert all(torch.equal(actual[name], expected[name].to(torch.bfloat16)) for name in first)
