"""A sweep over the blocks: its samples, the gradients it propagates back, and where it stores tensors."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pico
import pytest
import torch

from mla_convert.convert import CalibrationBatch, ConvertConfig, convert_model
from mla_convert.convert import calibrate as calibrate_module
from mla_convert.convert.blocks import ModelBlocks
from mla_convert.convert.calibrate import Visitor, sweep
from mla_convert.convert.clips import enter_clips
from mla_convert.convert.config import CalibrationConfig
from mla_convert.convert.probe import LayerSample
from mla_convert.convert.store import SHARE_OF_DISK, TensorStore
from mla_convert.draws import Use, drawn
from mla_convert.errors import UserError
from mla_convert.families.wan import FAMILY

LAYERS = 3
CONVERTED = {"metric": "output", "hidden_states": "converted"}


class Samples(Visitor):
    """The samples of a sweep, by layer."""

    def __init__(self) -> None:
        self.found: dict[int, LayerSample] = {}

    def visit(self, layer: int, block: Any, sample: LayerSample | None) -> None:
        assert sample is not None
        self.found[layer] = sample


def collect(
    dense: Any,
    layers: set[int],
    store: TensorStore | None = None,
    batches: list[CalibrationBatch] | None = None,
    **settings: Any,
) -> dict[int, LayerSample]:
    """Samples of some layers of a dense model, by layer."""
    samples = Samples()
    blocks, chosen = ModelBlocks(dense), CalibrationConfig(**pico.calibration(**settings))
    clips = enter_clips(blocks, batches or pico.batches(), chosen, store or TensorStore())
    sweep(blocks, clips, chosen, True, layers, samples)
    return samples.found


def equal(first: LayerSample, second: LayerSample) -> bool:
    return all(torch.equal(x, vars(second)[name]) for name, x in vars(first).items())


@pytest.mark.parametrize("metric", ["output", "velocity"])
def test_a_sample_does_not_depend_on_which_others_are_taken(metric: str) -> None:
    dense = pico.dense_model(layers=LAYERS)
    every = collect(dense, {0, 1, 2}, metric=metric)
    for layers in ({0}, {1, 2}, {2}):
        some = collect(dense, layers, metric=metric)
        assert some.keys() == layers
        assert all(equal(some[layer], every[layer]) for layer in layers)


@pytest.mark.parametrize("metric", ["output", "velocity"])
def test_hidden_states_on_disk_change_nothing(tmp_path: Path, metric: str) -> None:
    dense = pico.dense_model(layers=LAYERS)
    held = collect(dense, {0, 1, 2}, metric=metric)
    store = TensorStore(tmp_path / "activations", limit=0)
    spilled = collect(dense, {0, 1, 2}, store, metric=metric)
    assert all(equal(spilled[layer], held[layer]) for layer in held)
    store.clear()
    assert not (tmp_path / "activations").exists()


def test_hidden_states_that_fit_nowhere_are_refused_before_they_are_computed(tmp_path: Path) -> None:
    store = TensorStore(tmp_path / "activations", limit=0)
    with pytest.raises(UserError, match=r"stores 1e\+09 GB of hidden states, more than nine tenths .*; lower clips"):
        store.require(10**18, "lower clips")
    assert list(tmp_path.iterdir()) == []


class Watched(TensorStore):
    """Stores everything in files; `most` is the peak number of bytes of hidden states."""

    most = 0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, limit=0)

    def __setitem__(self, key: str, tensor: torch.Tensor) -> None:
        super().__setitem__(key, tensor)
        kept = (self[path.stem] for path in self._path(key).parent.glob("0*"))
        self.most = max(self.most, sum(x.numel() * x.element_size() for x in kept))


@pytest.mark.parametrize(("budget", "every"), [(14, 1), (13, 2), (9, 2), (8, 3)])
def test_a_small_disk_runs_blocks_twice_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, budget: int, every: int
) -> None:
    """Inputs of the upper twelve of thirteen blocks are kept as far as the disk holds `budget` of them."""
    dense, wanted = pico.dense_model(layers=13), {1, 2, 4, 7, 12}
    held = collect(dense, wanted)
    settings = CalibrationConfig(**pico.calibration())
    size = enter_clips(ModelBlocks(dense), pico.batches(), settings, TensorStore()).bytes_a_layer
    monkeypatch.setattr(TensorStore, "_free", lambda self: math.ceil(budget * size / SHARE_OF_DISK))
    store = Watched(tmp_path / "activations")
    found = collect(dense, wanted, store)
    assert all(equal(found[layer], held[layer]) for layer in wanted)
    assert store.most <= budget * size
    assert ("one block in" in caplog.text) == (every > 1)
    assert every == 1 or f"one block in {every}" in caplog.text


def test_a_disk_that_is_too_small_for_any_way_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorStore, "_free", lambda self: 1000)
    with pytest.raises(UserError, match=r"more than nine tenths of the .*; lower calibration\.clips or set"):
        collect(pico.dense_model(layers=3), {0, 1, 2}, TensorStore(tmp_path / "activations", limit=0))


def test_gradient_of_the_velocity_is_that_of_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block, with weights that require gradients, compared with autograd through the model.

    The last clip is alone in its batch, and counts as much as each of the others.
    """
    dense = pico.dense_model(layers=LAYERS).requires_grad_()
    chosen = CalibrationConfig(**pico.calibration())
    batches = pico.batches_of_unequal_size()
    grads: dict[tuple[int, int], torch.Tensor] = {}
    tokens_of: dict[int, int] = {}
    numbers = itertools.count()

    def record(layer: Any, hidden: torch.Tensor, *rest: Any, **more: Any) -> Any:
        number = next(numbers) % 2
        (grads[layer.layer, number],) = rest[-2]
        tokens_of[number] = rest[3]
        return original(layer, hidden, *rest, **more)

    original = calibrate_module.sample_layer
    monkeypatch.setattr(calibrate_module, "sample_layer", record)
    collect(dense, {0, 1, 2}, batches=batches, max_tokens=20)
    assert all(parameter.grad is None for parameter in dense.parameters())
    assert tokens_of == {0: 16, 1: 4}

    clips = enter_clips(ModelBlocks(dense), batches, chosen, TensorStore())
    for number, inputs in enumerate(clips.inputs):
        seen: list[torch.Tensor] = []
        hooks = [b.attn1.register_forward_hook(lambda _, args, out, s=seen: s.append(out)) for b in dense.blocks]
        tokens = clips.store[clips.key(0, number)]
        for block in dense.blocks:
            tokens = block(tokens, *inputs.shared)
        v = dense.leave(tokens, inputs)
        for hook in hooks:
            hook.remove()
        z = torch.randn(v.shape, generator=drawn(Use.PROJECTION, chosen.seed, number))
        expected = torch.autograd.grad(v, seen, z / v[0].numel() ** 0.5)
        for layer, grad in enumerate(expected):
            # Observed 2.4e-7 of the largest.
            assert pico.relative_error(grads[layer, number], grad) < 2e-6


def test_expected_square_of_a_probe_is_the_mean_squared_velocity_error() -> None:
    """A random error of the attention output, weighted by many gradients, compared with its effect on the velocity."""
    dense = pico.dense_model()
    blocks, chosen = ModelBlocks(dense), CalibrationConfig(**pico.calibration())
    inputs = enter_clips(blocks, pico.batches()[:1], chosen, store := TensorStore()).inputs[0]
    tokens = store["0000-00000"]
    error = 1e-3 * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0))

    def velocity(added: torch.Tensor) -> torch.Tensor:
        hook = dense.blocks[0].attn1.register_forward_hook(lambda _, args, out: out + added)
        x = tokens
        for block in dense.blocks:
            x = block(x, *inputs.shared)
        hook.remove()
        return dense.leave(x, inputs)

    with torch.no_grad():
        mean_squared = float((velocity(error) - velocity(torch.zeros_like(error))).square().mean())
    added = torch.zeros_like(error).requires_grad_()
    v = velocity(added)
    products = []
    for draw in range(200):
        z = torch.randn(v.shape, generator=drawn(Use.PROJECTION, draw, 0)) * v.numel() ** -0.5
        (grad,) = torch.autograd.grad(v, added, z, retain_graph=True)
        products.append(float((grad * error).sum()) ** 2)
    assert sum(products) / len(products) == pytest.approx(mean_squared, rel=0.3)


def test_history_is_entered_at_the_noise_level_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, (batch, _), seen = pico.dense_model(), pico.batches(), []

    def enter(*given: Any, **named: Any) -> Any:
        seen.append((*given, named))
        return original(*given, **named)

    original = dense.enter
    monkeypatch.setattr(dense, "enter", enter)
    for settings in ({}, {"context_noise": 0.3}):
        enter_clips(ModelBlocks(dense), [batch], CalibrationConfig(**pico.calibration(**settings)), TensorStore())
    (x, t, _, clean), (same_x, same_t, _, noised) = seen
    assert torch.equal(x, same_x) and torch.equal(t, same_t)
    assert torch.equal(clean["context"], batch.latents) and clean["context_timestep"].tolist() == [0] * 4
    assert noised["context_timestep"].tolist() == pytest.approx([300] * 4)
    noise = (noised["context"] - 0.7 * batch.latents) / 0.3
    assert float(noise.std()) == pytest.approx(1, abs=0.1)
    level = t[:, None, :, None, None] / 1000
    assert not torch.allclose(level * noise, x - (1 - level) * batch.latents, atol=0.1)


def test_layers_see_what_the_converted_ones_below_made() -> None:
    dense = pico.dense_model(layers=LAYERS)
    states = {}
    for name, settings in (("teacher", {"metric": "output"}), ("converted", CONVERTED)):
        model = convert_model(
            FAMILY, dense, ConvertConfig(kv_lora_rank=4, calibration=pico.calibration(**settings)), pico.batches()
        )
        assert torch.isfinite(model(*pico.inputs(2, 7, 6, 4)).sample).all()
        states[name] = model.state_dict()
    same = [
        torch.equal(states["teacher"][name], states["converted"][name])
        for name in (f"blocks.{layer}.attn1.kv_a_proj.weight" for layer in range(LAYERS))
    ]
    assert same == [True, False, False]


def test_converted_hidden_states_are_those_of_the_converted_model() -> None:
    """The inputs of layer 2 are the outputs of the converted model's layers 0 and 1 for the same clips."""
    dense = pico.dense_model(layers=LAYERS)
    settings = ConvertConfig(kv_lora_rank=4, calibration=pico.calibration(**CONVERTED))
    model = convert_model(FAMILY, dense, settings, pico.batches())
    blocks = ModelBlocks(dense)
    entered: dict[int, torch.Tensor] = {}

    class Entered(Visitor):
        def visit(self, layer: int, block: Any, sample: LayerSample | None) -> Any:
            if layer == LAYERS - 1:
                entered[layer] = clips.store[clips.key(layer, 0)]
            return model.blocks[layer].attn1

    clips = enter_clips(blocks, pico.batches(), settings.calibration, TensorStore())
    tokens, inputs = clips.store[clips.key(0, 0)], clips.inputs[0]
    sweep(blocks, clips, settings.calibration, True, {LAYERS - 1}, Entered())
    with torch.no_grad():
        for block in model.blocks[: LAYERS - 1]:
            tokens = block(tokens, *inputs.shared)
    assert torch.equal(entered[LAYERS - 1], tokens)
