"""Offloading models that do not fit on a GPU: which weights are pinned, and that nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pico
import pytest
import torch
from device_case import Clips, model, same
from pretend_gpu import GPU
from test_decode import tiny_vae
from torch import Tensor
from transformers import UMT5EncoderModel
from wan_pipeline_case import write_wan_pipeline

import mla_convert.run.offload
from mla_convert.distill.encode.models import text_encoder
from mla_convert.evaluate.fidelity import fidelity
from mla_convert.mla.plain import is_plain
from mla_convert.run.decode import decode_chunks
from mla_convert.run.offload import WEIGHTS_SHARE, Weights, _fits_pinned, place, together
from mla_convert.run.stream import stream_chunks


def test_weights_are_pinned_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3)]
    # Weights and biases of 60, 12, 12 and 12 bytes; averages of 12 and 12 and a counter of 8.
    needed = 64 + 5 * 16 + 8
    for processes, available, fits in ((1, 2 * needed, True), (1, 2 * needed - 1, False), (2, 2 * needed, False)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        monkeypatch.setattr("psutil.virtual_memory", lambda available=available: SimpleNamespace(available=available))
        assert _fits_pinned(models) == fits
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self.clone())
    before = models[0].weight.data_ptr()
    weights = Weights(models[0], torch.device("cpu"), pinned=True)
    assert models[0].weight.data_ptr() != before
    pinned = models[0].weight.data_ptr()
    weights.bring()
    weights.leave()
    assert models[0].weight.data_ptr() == pinned

    def refused(self: Tensor) -> Tensor:
        raise RuntimeError("cudaHostAlloc failed")

    monkeypatch.setattr(Tensor, "pin_memory", refused)
    Weights(models[0], torch.device("cpu"), pinned=True)
    assert models[0].weight.data_ptr() == pinned


@pytest.mark.parametrize(
    ("fits", "refused_from", "expected"),
    [
        (True, None, (True, False)),
        (False, None, (True, True)),
        (True, 5, (False, False)),
        (False, 0, (False, True)),
    ],
)
def test_blocks_are_pinned_for_good_or_one_at_a_time_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fits: bool,
    refused_from: int | None,
    expected: tuple[bool, bool],
) -> None:
    """By whether all weights fit, and from which tensor on the system refuses; what diffusers is then asked for."""
    models = [pico.dense_model(layers=2), pico.dense_model(layers=1)]
    blocks = [sum(x.nbytes for x in block.parameters()) for model in models for block in model.blocks]
    pinned: list[int] = []

    def pin(self: Tensor) -> Tensor:
        if refused_from is not None and len(pinned) >= refused_from:
            raise RuntimeError("cudaHostAlloc failed")
        pinned.append(self.nbytes)
        return self.clone()

    asked: list[tuple[bool, bool]] = []
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(mla_convert.run.offload, "_fits_pinned", lambda _: fits)
    monkeypatch.setattr(
        mla_convert.run.offload,
        "apply_group_offloading",
        lambda model, use_stream, low_cpu_mem_usage, **_: asked.append((use_stream, low_cpu_mem_usage)),
    )
    place(models, None, torch.device("cuda"), "group")
    assert asked == [expected] * 2
    if refused_from is None:
        everything = sum(x.nbytes for model in models for x in (*model.parameters(), *model.buffers()))
        assert sum(pinned) == (everything if fits else max(blocks))
    assert caplog.text.count("does not let this process pin memory") == (refused_from is not None)


@pytest.mark.parametrize("offload", ["none", "model", "group"])
def test_offloading_changes_nothing_and_reaches_every_pass(offload: str) -> None:
    """The device is the CPU, so this tests that the hooks run, not where the weights are."""
    vae = tiny_vae()
    models = [pico.dense_model(in_channels=4, out_channels=4, seed=seed) for seed in (0, 1)]
    models[0].noise_range, models[1].noise_range = (0.5, 1.0), (0.0, 0.5)
    prompts = pico.inputs(1, 1, 4, 4)[2]

    def made() -> Tensor:
        chunks = stream_chunks(models, prompts, 4, 4, 4, num_inference_steps=3, device=torch.device("cpu"))
        return torch.cat(list(decode_chunks(chunks, vae)), dim=2)

    expected = made()
    place(models, vae, torch.device("cpu"), offload)  # type: ignore[arg-type]
    assert torch.equal(made(), expected)
    if offload == "model":
        assert torch.equal(made(), expected)
        moved: list[int] = []
        for number, one in enumerate((*models, vae)):
            weights = one._hf_hook.weights
            weights.bring = lambda weights=weights, number=number: (
                moved.append(number) if not weights.on_device else None,
                Weights.bring(weights),
            )
        made()
        # A chunk is decoded before it is written. The last to write steps first; nothing writes the last chunk.
        assert moved == [0, 1, 2, 1, 0, 1, 2]


def test_weights_that_find_no_memory_on_the_way_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = torch.nn.Linear(5, 3)
    weights = Weights(linear, torch.device("cpu"), pinned=False)
    home = [x.data_ptr() for x in linear.parameters()]

    def scarce(self: Tensor, *_: Any, **__: Any) -> Tensor:
        if self.ndim == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.clone()

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "to", scarce)
        with pytest.raises(torch.OutOfMemoryError):
            weights.bring()
    assert not weights.on_device and [x.data_ptr() for x in linear.parameters()] == home
    monkeypatch.setattr(Tensor, "to", lambda self, *_, **__: self.clone())
    weights.bring()
    assert all(x.data_ptr() != old for x, old in zip(linear.parameters(), home, strict=True))


@pytest.mark.parametrize(("stay", "shared"), [(0, 2), (1, 1), (2, 1)])
def test_models_that_do_not_fit_together_are_compared_layer_by_layer(
    monkeypatch: pytest.MonkeyPatch, stay: int, shared: int
) -> None:
    """A teacher and its student, whose layers share latents or do not, on a pretended GPU for none, one or both."""
    teacher = model(None)
    student = model(6, layers_per_latent=shared)
    weights = sum(x.nbytes for one in (teacher, student)[:stay] for x in (*one.parameters(), *one.buffers()))
    free = weights / WEIGHTS_SHARE + 1
    monkeypatch.setattr(mla_convert.run.offload, "free_memory", lambda device: free if device == GPU else None)
    most = [0, 0]
    bring = Weights.bring

    def measured(device: torch.device) -> Tensor:
        models = [copy.deepcopy(one) for one in (teacher, student)]

        def counted(weights: Weights) -> None:
            bring(weights)
            for index, one in enumerate(models):
                most[index] = max(most[index], sum(next(b.parameters()).device == GPU for b in one.blocks))

        monkeypatch.setattr(Weights, "bring", counted)
        with together(models, device):
            assert {one.device for one in models} == {device}
            found = fidelity(models[1], models[0], Clips(None).heldout(2), batch_size=1, seed=0)
        for one in models:
            assert {x.device.type for x in (*one.parameters(), *one.buffers())} == {"cpu"}
            assert all(is_plain(module) for module in one.modules())
        errors = [found[key] for key in ("teacher_loss", "student_loss", "velocity_rel_error")]
        maps = [layer["logit_error"] for layer in found["attention_maps"]]
        return torch.tensor([*errors, *found["attention_rel_error"], *maps[0], *maps[-1]])

    same(measured)
    layers = len(teacher.blocks)
    # Weights that stay are not brought.
    assert most == [[shared, shared], [layers, shared], [0, 0]][stay]


@pytest.mark.parametrize("failing", [0, 1])
def test_no_hook_stays_where_memory_ends_on_the_way(monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """The blocks of the first or the second model have hooks already, while its other weights move."""
    models = [model(None), model(6)]
    monkeypatch.setattr(mla_convert.run.offload, "free_memory", lambda device: 1)
    last = list(models[failing].children())[-1]

    def full(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(last, "to", full)
        with pytest.raises(torch.OutOfMemoryError), together(models, torch.device("cpu")):
            pytest.fail("nothing may run")
    for one in models:
        assert all(is_plain(module) and not hasattr(module, "_hf_hook") for module in one.modules())


def test_a_text_encoder_that_does_not_fit_runs_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    folder, known = write_wan_pipeline(tmp_path / "pipeline"), UMT5EncoderModel.to
    with text_encoder(folder, torch.float32, torch.device("cpu")) as embed:
        expected = embed(["red"])

    def full(self: Any, device: Any) -> Any:
        if torch.device(device).type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return known(self, device)

    monkeypatch.setattr(UMT5EncoderModel, "to", full)
    with text_encoder(folder, torch.float32, torch.device("cuda")) as embed:
        assert torch.equal(embed(["red"]), expected)
    assert caplog.messages[-1] == "the text encoder does not fit on cuda; it runs on the CPU, which takes longer"
