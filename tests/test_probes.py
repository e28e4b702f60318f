"""Several probes of the velocity, and a ridge in its metric: what is averaged, added and unchanged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from recipe_case import digests
from test_sweep import Samples, Watched

from mla_convert.convert import ConvertConfig, convert_model, convert_source
from mla_convert.convert.blocks import ModelBlocks
from mla_convert.convert.budget import Trace, measured_curve
from mla_convert.convert.calibrate import sweep
from mla_convert.convert.clips import enter_clips
from mla_convert.convert.config import CalibrationConfig
from mla_convert.convert.factorize import RIDGE, low_rank_code, low_rank_code_of_samples
from mla_convert.convert.probe import FIELDS, LayerSample
from mla_convert.convert.store import SHARE_OF_DISK, TensorStore
from mla_convert.convert.target import as_read, factors, layout_target, moments
from mla_convert.draws import Use, drawn
from mla_convert.errors import UserError
from mla_convert.export.checkpoint import save_checkpoint
from mla_convert.families.wan import FAMILY
from mla_convert.load import load_dense, load_source

LAYERS, PROBES = 3, 3
GRADS = [name for name in FIELDS if name.endswith("_grad")]
IMPROVED = pico.calibration(probes=PROBES, ridge=0.05)


def collect(dense: Any, store: TensorStore | None = None, rotated_only: bool = False, **settings: Any) -> Any:
    """Samples of all layers of a dense model, by layer."""
    samples = Samples()
    blocks, chosen = ModelBlocks(dense), CalibrationConfig(**pico.calibration(**settings))
    clips = enter_clips(blocks, pico.batches(), chosen, store or TensorStore())
    sweep(blocks, clips, chosen, True, range(LAYERS), samples, rotated_only=rotated_only)
    return samples.found


def only(sample: LayerSample, probe: int) -> LayerSample:
    """The sample with only one of its probes."""
    return replace(sample, **{name: getattr(sample, name)[probe :: sample.probes].contiguous() for name in GRADS})


def same(first: LayerSample, second: LayerSample, names: Any = FIELDS) -> bool:
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)


@pytest.fixture(scope="module")
def dense() -> Any:
    return pico.dense_model(layers=LAYERS)


@pytest.mark.parametrize("metric", ["velocity", "output"])
def test_the_first_of_several_probes_is_the_only_one_of_today(dense: Any, metric: str) -> None:
    one, several = collect(dense, metric=metric), collect(dense, metric=metric, probes=PROBES)
    assert [one[0].probes, several[0].probes] == [1, PROBES]
    for layer in range(LAYERS):
        first = only(several[layer], 0)
        # Tokens of the velocity's sample are drawn behind nothing; of the output's behind z of every probe.
        assert same(first, one[layer]) == (metric == "velocity")
        assert not torch.equal(only(several[layer], 1).value_grad, first.value_grad)


def test_every_probe_is_a_projection_of_its_own(dense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second probe equals that of a run whose only probe is drawn like it."""
    several = collect(dense, probes=PROBES)
    from mla_convert.convert import calibrate

    def second(use: Use, seed: int, *numbers: int) -> torch.Generator:
        return (
            drawn(use, seed, *numbers[:1], 1)
            if use is Use.PROJECTION and len(numbers) == 2
            else original(use, seed, *numbers)
        )

    original = drawn
    monkeypatch.setattr(calibrate, "drawn", second)
    alone = collect(dense)
    assert all(same(only(several[layer], 1), alone[layer]) for layer in range(LAYERS))


def test_keys_that_are_read_rotated_ask_for_nothing_else(dense: Any) -> None:
    every, rotated = collect(dense, probes=2), collect(dense, probes=2, rotated_only=True)
    names = [name for name in FIELDS if name not in ("fixed_grad", "placed_grad")]
    assert all(same(every[layer], rotated[layer], names) for layer in range(LAYERS))
    assert rotated[0].fixed_grad.numel() == rotated[0].placed_grad.numel() == 0


@pytest.mark.parametrize("variant", pico.VARIANTS, ids=lambda v: f"{v['position']}-{v['own_chunk']}")
def test_moments_are_averaged_over_the_probes(dense: Any, variant: dict[str, Any]) -> None:
    config = ConvertConfig(**variant, key_mean=False)
    whole = as_read(collect(dense, probes=PROBES)[1], config)[0]
    target = layout_target(dense.blocks[1].attn1, whole, dense.rotary_table().axes, config)
    covariance, mean, metric = moments([(target, whole)])
    apart = [moments([(target, only(whole, probe))]) for probe in range(PROBES)]
    # Observed 1.2e-15 of the largest.
    assert pico.relative_error(metric, torch.stack([m for _, _, m in apart]).mean(0)) < 1e-12
    samples, mean_of_factors, probes = factors([(target, whole)], torch.device("cpu"))
    assert len(samples) == len(whole.hidden) and len(probes) == PROBES * len(samples)
    for found, expected in ((samples.T @ samples, covariance), (mean_of_factors, mean), (probes.T @ probes, metric)):
        # Observed 2.4e-14.
        assert pico.relative_error(found, expected) < 1e-12


def test_more_probes_know_the_metric_better(dense: Any) -> None:
    config = ConvertConfig()
    target = layout_target(dense.blocks[0].attn1, None, dense.rotary_table().axes, config)

    def metric(**settings: Any) -> torch.Tensor:
        sample = collect(dense, rotated_only=True, **settings)[0]
        return moments([(target, as_read(sample, config)[0])])[2]

    known = metric(probes=64)
    errors = [pico.relative_error(metric(probes=count), known) for count in (1, 8)]
    # Observed 0.19 and 0.09 of the largest entry.
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("ridge", [RIDGE, 0.05, 1.0])
def test_a_ridge_is_a_share_of_the_mean_eigenvalue(ridge: float) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(20, 12, generator=generator, dtype=torch.float64) * torch.linspace(3, 0.1, 12)
    probes = torch.randn(60, 12, generator=generator, dtype=torch.float64) * torch.linspace(0.01, 2, 12)
    metric, mean = probes.T @ probes, torch.zeros(12, dtype=torch.float64)
    code = low_rank_code(samples.T @ samples, metric, mean, 5, ridge)
    added = metric + ridge * torch.trace(metric) / 12 * torch.eye(12)
    best = low_rank_code(samples.T @ samples, added, mean, 5)
    few = low_rank_code_of_samples(samples[:8], probes, mean, 5, ridge)
    whole = low_rank_code(samples[:8].T @ samples[:8], metric, mean, 5, ridge)
    # Observed 6.7e-6, by the ridge that the sum gets once more, and 2.5e-14.
    for found, expected, bound in ((code, best, 1e-4), (few, whole, 1e-9)):
        assert pico.relative_error(found.decoder @ found.encoder, expected.decoder @ expected.encoder) < bound


@pytest.mark.parametrize("variant", pico.VARIANTS, ids=lambda v: f"{v['position']}-{v['own_chunk']}")
def test_every_layout_is_fitted_with_several_probes(dense: Any, variant: dict[str, Any]) -> None:
    models = [
        convert_model(FAMILY, dense, ConvertConfig(**variant, calibration=calibration), pico.batches())
        for calibration in (pico.calibration(), IMPROVED)
    ]
    name = "blocks.1.attn1.kv_a_proj.weight"
    assert not torch.equal(*(model.state_dict()[name] for model in models))
    assert torch.isfinite(models[1](*pico.inputs(2, 7, 6, 4)).sample).all()


def test_a_killed_conversion_goes_on_to_the_same_bytes(dense: Any, tmp_path: Path) -> None:
    dense.save_pretrained(tmp_path / "dense")
    source = load_source(str(tmp_path / "dense"))
    config = ConvertConfig(kv_lora_rank=10, calibration=IMPROVED)

    class Killed(Exception):
        pass

    def kill(what: str, done: int, total: int) -> None:
        if what == "convert" and done < total:
            raise Killed

    def convert(work: str, progress: Any = None, config: ConvertConfig = config) -> Any:
        found = convert_source(source, config, tmp_path / work, pico.batches(), progress=progress)
        save_checkpoint(found.model, tmp_path / f"{work}-saved", {}, tensors=found.tensors)
        return digests(tmp_path / f"{work}-saved")

    whole = convert("whole")
    for _ in range(LAYERS - 1):
        with pytest.raises(Killed):
            convert("killed", kill)
    assert convert("killed") == whole
    model = convert_model(FAMILY, load_dense(source), config, pico.batches())
    save_checkpoint(model, tmp_path / "memory", {})
    assert digests(tmp_path / "memory") == whole
    # Layers that were fitted in another metric are fitted again.
    other = config.model_copy(update={"calibration": CalibrationConfig(**IMPROVED | {"ridge": 0.1})})
    assert convert("killed", config=other) != whole


def test_gradients_of_all_probes_count_where_the_disk_is_small(
    dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = CalibrationConfig(**pico.calibration())
    size = enter_clips(ModelBlocks(dense), pico.batches(), chosen, TensorStore()).bytes_a_layer
    # Three inputs, one of a segment and what leaves a block, and two more gradients.
    for blocks, fits in ((7, True), (6, False)):
        monkeypatch.setattr(TensorStore, "_free", lambda self, b=blocks: -(-b * size // 1) / SHARE_OF_DISK + 1)
        store = Watched(tmp_path / f"activations-{blocks}")
        if fits:
            found, held = collect(dense, store, probes=PROBES), collect(dense, probes=PROBES)
            assert all(same(found[layer], held[layer]) for layer in held)
            assert store.most <= blocks * size
            continue
        with pytest.raises(UserError, match=r"lower calibration\.clips or calibration\.probes or set calibration\.met"):
            collect(dense, store, probes=PROBES)


def test_a_curve_is_the_mean_over_the_probes(dense: Any) -> None:
    inputs = enter_clips(
        ModelBlocks(dense), pico.batches()[:1], CalibrationConfig(**pico.calibration()), store := TensorStore()
    ).inputs[0]
    hidden, layer = store["0000-00000"], dense.blocks[0].attn1
    other = pico.dense_model(layers=LAYERS, seed=1).blocks[0].attn1
    grads = [torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]

    def error(given: list[torch.Tensor]) -> float:
        return measured_curve([layer], lambda rank: [other], [1], [[Trace(hidden, inputs.step, given)]])[0][1]

    assert error(grads) == pytest.approx((error(grads[:1]) + error(grads[1:])) / 2, rel=1e-6)
